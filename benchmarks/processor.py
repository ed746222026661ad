"""Which bits does this processor compute? Two machines that print one digest repeat each other's results exactly.

Thirty training steps of the shipped base model, from seeds, with one thread: once as everything here runs, then with
the libraries held to instructions that more processors have. Where the first digests of two machines differ, their
tables differ in the last digits; a setting whose digests agree on both is one that would make them equal.

`python benchmarks/processor.py` (a minute)
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL compatible, oneDNN and ATen with AVX2": {
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}


def digest() -> str:
    """Return the digest of the U-Net's weights after thirty steps."""
    import torch

    from splitlab import ROOT, load_base

    base = load_base(ROOT / "models" / "base")
    unet, generator = base.unet.train().requires_grad_(True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(30):
        noisy = torch.randn(8, *base.latent_shape(32), generator=generator)
        timesteps = torch.randint(0, 1000, (8,), generator=generator)
        text = torch.randn(8, *base.text_shape, generator=generator)
        loss = (unet(noisy, timesteps, text).sample - noisy).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in unet.parameters())).hexdigest()[:16]


def processor() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = ("model name", "cpu family", "model\t")
    return ", ".join(next(line.split(": ")[1] for line in lines if line.startswith(kind)) for kind in kinds)


def main() -> None:
    if sys.argv[1:] == ["digest"]:
        print(digest())
        return
    print(f"processor: {processor()}")
    for name, settings in SETTINGS.items():
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | settings
        done = subprocess.run([sys.executable, __file__, "digest"], env=environment, capture_output=True, text=True)
        print(f"{name}: {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
