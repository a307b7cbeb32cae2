"""Record golden.npz and golden.json anew: python tests/golden/record.py

They hold what the package did before its packages were rearranged: record only after a deliberate change of behaviour,
and say which in the commit. The lamamba that Python finds is recorded, by default the one of this checkout.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1]))

from tests.golden.cases import fingerprint, make_all, one_thread, onnx_output  # noqa: E402

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="golden") as work:
        arrays, texts = make_all(Path(work))
        with one_thread():
            arrays["onnx"] = onnx_output(Path(work))
    np.savez_compressed(FOLDER / "golden.npz", **arrays)                        # type: ignore[arg-type]
    (FOLDER / "golden.json").write_text(json.dumps({"fingerprint": fingerprint(), **texts}, indent=1) + "\n")
    print(f"{len(arrays)} arrays and {len(texts)} texts in {FOLDER}")
