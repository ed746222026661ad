"""What the learning rate and the fixed noise of the shipped runs were chosen over, on the images of the tables.

`python benchmarks/defaults.py` trains the runs of params/split.yaml named below with other values, one seed, and prints
their control IoU as learned, on the same 64 held-out hints as `reports/metrics/training.csv`. Models are kept in
`.cache/defaults`, so an interrupted call goes on.
"""

from dataclasses import replace

from splitlab import CACHE, TrainConfig, load_base, load_params, load_split, parse
from splitlab.core.checkpoint import load_json
from splitlab.data.image_set import digest
from splitlab.split.train import train

OTHERS = [
    ("shapes-central", 1e-3, None),
    ("shapes-s1", 1e-3, 0.1),
    ("shapes-s1", 1e-3, 0.5),
    ("shapes-s1-floor600", 1e-3, 0.1),
    ("shapes-s1-floor600", 1e-3, 0.5),
]
"""(run, learning rate, fixed noise); the shipped ones have 2e-3 and 0.1."""


def main():
    params = load_params()
    base = load_base(params["base"]["source"])
    for run, lr, fixed_noise in OTHERS:
        config = replace(parse(TrainConfig, params["runs"][run], where=run), lr=lr)
        if fixed_noise is not None:
            config = replace(config, defences=replace(config.defences, fixed_noise=fixed_noise))
        out = CACHE / "defaults" / f"{run}-{digest({'config': config, 'base': base.digest})[:16]}"
        if not (out / "record.json").exists():
            private, heldout = (load_split(config.dataset, split, params) for split in ("private", "heldout"))
            train(run, config, base, private, heldout, out=out, cache=CACHE)
        iou = load_json(out / "record.json")["control_iou"]
        print(f"{run}, learning rate {lr:g}, fixed noise {fixed_noise}: control IoU {iou:.3f}", flush=True)


if __name__ == "__main__":
    main()
