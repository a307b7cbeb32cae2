"""Images a second of LaMamba-Diff-S and DiT-S/2 on this machine, in turns: python examples/images_per_second.py"""

import lamamba

options = lamamba.BenchmarkOptions(models="s", peers="dit-s-2", image_sizes=128, batch=4, seconds=5.0)
result = lamamba.benchmark(options)                                             # each network in a process of its own
for row in result.rows:
    print(f"{row['model']:<8} {row['images_per_second']:7.2f} images/s")
print(f"LaMamba is {result.ratios[0]['ratio']:.2f} times as fast")
for size in (256, 512, 1024):                                                   # counted, not run
    print(size, lamamba.info(lamamba.InfoOptions(model="xl", image_size=size)).cost.matrix / 1e9, "G multiply-adds")
