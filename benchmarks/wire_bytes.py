"""Bytes per sample on the wire at Stable Diffusion 1.5 shapes, ours against S1's released protocol.

`python benchmarks/wire_bytes.py` prints one JSON object.
"""

import json

from splitlab import Defences
from splitlab.split.client import reference_message, sample_bytes

LATENTS, TEXT, UNET_WIDTH = (4, 64, 64), (77, 768), 320


def main():
    s1 = Defences(timestep_floor=200, symsigmoid=True, fixed_noise=0.1, half=True, hide_prompts=True)
    reference = sum(tensor.nbytes for tensor in reference_message(LATENTS, TEXT, UNET_WIDTH).values())
    ours = {str(defences): sample_bytes(LATENTS, TEXT, defences) for defences in (Defences(), s1)}
    print(json.dumps({"released protocol": reference} | ours, indent=1))


if __name__ == "__main__":
    main()
