// Parallel loops on the threads of torch's own OpenMP runtime.
//
// The library is linked to no OpenMP: the entry points are looked up in the process through torch's own library and
// passed in once. So there is never a second runtime, and torch.set_num_threads governs these threads too. Compilers
// whose runtime has no such entry points (MSVC) build with their own OpenMP instead; without either, one thread works.

#pragma once

#include <cstdint>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
};
inline OpenMP openmp;                                           // one for all sources of the library

namespace {

template <class Work>
struct Shares {
    const Work* work;
    int64_t count;

    // The number of shares is fixed by the caller, independent of the number of threads: each share's sums are the same
    // on every thread.
    static void run(void* argument) {
        const Shares& shares = *static_cast<const Shares*>(argument);
#ifdef _OPENMP
        int64_t first = omp_get_thread_num(), step = omp_get_num_threads();
#else
        int64_t first = openmp.thread(), step = openmp.threads();
#endif
        for (int64_t share = first; share < shares.count; share += step) (*shares.work)(share);
    }
};

// work(share) for share = 0 .. count - 1, each once.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
    if (count > 1) {
        Shares<Work> shares{&work, count};
#ifdef _OPENMP
#pragma omp parallel num_threads(int(count))
        Shares<Work>::run(&shares);
        return;
#else
        if (openmp.parallel) return openmp.parallel(&Shares<Work>::run, &shares, unsigned(count), 0);
#endif
    }
    for (int64_t share = 0; share < count; ++share) work(share);
}

// Working memory of one thread, reused between calls because page faults are expensive.
class Scratch {
  public:
    // At least `size` floats, aligned for any vector, uninitialised.
    float* take(int64_t size) {
        if (size > size_) {
            std::free(memory_);
            memory_ = std::malloc(size_t(size) * sizeof(float) + 64);
            size_ = memory_ ? size : 0;
        }
        if (!memory_) std::abort();
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t(63));
    }
    ~Scratch() { std::free(memory_); }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};
thread_local Scratch scratch;

}  // namespace
