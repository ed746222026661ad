"""The command line. Each command is a thin shell over a function of the package, which it imports when it is called."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from splitlab.core.errors import InputError
from splitlab.core.paths import CACHE, ROOT, resolve

AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]

FOLDERS = {
    "runs": "runs",
    "reconstructions": "reconstructions",
    "metrics": "reports/metrics",
    "figures": "reports/figures",
    "update_figures": "reports/figures-updates",
    "dp_figures": "reports/figures-dp",
}
"""What the report is made of, by the argument that names it."""


KEYS = Path(".cache", "remote", "keys")
"""Where the keys lie for training between machines."""


class Commands(TyperGroup):
    """Commands whose bad input is one line and exit code 2, and which may be interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("stopped; whatever was finished before is kept", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="What can the other side reconstruct when a diffusion model is trained on private images?",
)


@app.command()
def doctor(
    params: Annotated[str, typer.Option(help="The parameter file.")] = "params.yaml", as_json: AsJson = False
) -> None:
    """Say what works here, what is missing, and which command mends it; exit code 1 if something needed is missing."""
    from splitlab.doctor import diagnose

    checks = diagnose(params)
    if as_json:
        _print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            mark = "ok" if check.works else "MISSING" if check.needed else "-"
            mend = f"; mend: {check.mend}" if check.mend and not check.works else ""
            typer.echo(f"{mark:8}{check.what:20} {check.detail}{mend}")
    raise typer.Exit(any(check.needed and not check.works for check in checks))


@app.command()
def plan(
    dataset: Annotated[str, typer.Option(help="What was measured on: shapes or photos.")] = "shapes",
    messages: Annotated[int, typer.Option(help="How often a run sends each image.")] = 1,
    identification: Annotated[float, typer.Option(help="Largest share that an attacker may identify.")] = math.inf,
    psnr_db: Annotated[float, typer.Option(help="Largest mean PSNR that an attacker may reach, dB.")] = math.inf,
    delta: Annotated[float, typer.Option(help="δ of the guarantee, below 1 / number of images.")] = 1e-5,
    norm: Annotated[float, typer.Option(help="Norm that clients bound latents to; 0: that of public images.")] = 0.0,
    metrics: Annotated[str, typer.Option(help="Folder of the tables.")] = "reports/metrics",
    as_json: AsJson = False,
) -> None:
    """Propose the most useful setting that was measured under which no attack exceeds the target, and its ε."""
    from splitlab.diffusion.base import load_base
    from splitlab.params import load_params, load_split
    from splitlab.study import planner

    params = load_params()
    settings = planner.shipped(dataset, messages=messages, metrics=metrics)
    base = load_base(params["base"]["source"])
    bound = norm or planner.usual_norm(base, load_split(dataset, "public", params, limit=640), cache=CACHE)
    proposal = planner.plan(
        settings,
        base.alphas_cumprod,
        norm=bound,
        delta=delta,
        messages=messages,
        identification=identification,
        psnr_db=psnr_db,
    )
    if as_json:
        _print_json(dataclasses.asdict(proposal))
    else:
        typer.echo(str(proposal))


@app.command()
def attack_update(
    gradient: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors or .npz file of gradients.")],
    model: Annotated[Path, typer.Option(help="The weights that the client started from: a diffusers folder.")],
    attack: Annotated[str, typer.Option(help="The attack's name.")] = "unknown_noise",
    base: Annotated[Path | None, typer.Option(help="Stable Diffusion folder, for latent models.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the model's input.")] = None,
    kind: Annotated[str, typer.Option(help="gradient or weight_difference.")] = "gradient",
    lr: Annotated[float | None, typer.Option(help="Learning rate of a weight difference.")] = None,
    steps: Annotated[int, typer.Option(help="Local steps of a weight difference.")] = 1,
    objective: Annotated[str, typer.Option(help="epsilon or v_prediction.")] = "epsilon",
    scale: Annotated[float | None, typer.Option(help="What the loss was multiplied with; else found.")] = None,
    clipped: Annotated[bool, typer.Option(help="The gradient was shortened to some norm.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Images behind the update, if known.")] = None,
    seed: Annotated[int, typer.Option(help="Of the attacker's draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the images; else one in scratch/.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attack an update that a federated client shared: print what it tells, and save the images that it gives away."""
    from splitlab.core.pixels import save_pngs
    from splitlab.federated.external import attack_gradient

    outcome = attack_gradient(
        gradient,
        model=model,
        attack=attack,
        base=base,
        size=size,
        kind=kind,
        lr=lr,
        steps=steps,
        objective=objective,
        scale=scale,
        clipped=clipped,
        batch_size=batch_size,
        seed=seed,
    )
    results = outcome if isinstance(outcome, tuple) else (outcome,)
    facts = [_facts(result) for result in results]
    if (images := getattr(outcome, "images", None)) is not None and images.shape[1] in (1, 3):
        folder = resolve(out or Path("scratch", "attack-update", gradient.stem))
        save_pngs(images, folder, "attack-update")
        facts[0]["saved"] = str(folder)
    elif images is not None:
        facts[0]["saved"] = f"nothing: {images.shape[1]} channels make no picture; --base decodes latents"
    if as_json:
        _print_json(facts)
    else:
        for name, value in (item for entry in facts for item in entry.items()):
            for line in value if name == "warnings" else (value,):
                typer.echo(f"{name}: {line}")


@app.command()
def report(
    runs: Annotated[str, typer.Option()] = FOLDERS["runs"],
    reconstructions: Annotated[str, typer.Option()] = FOLDERS["reconstructions"],
    metrics: Annotated[str, typer.Option()] = FOLDERS["metrics"],
    figures: Annotated[str, typer.Option()] = FOLDERS["figures"],
    update_figures: Annotated[str, typer.Option()] = FOLDERS["update_figures"],
    dp_figures: Annotated[str, typer.Option()] = FOLDERS["dp_figures"],
    executed: Annotated[str, typer.Option(help="The executed notebook to write.")] = "reports/executed/report.ipynb",
    out: Annotated[str, typer.Option(help="The page to write.")] = "reports/index.html",
) -> None:
    """Render the report from the pipeline's tables and figures as one HTML page."""
    from splitlab.report.page import write_report

    given = (runs, reconstructions, metrics, figures, update_figures, dp_figures)
    folders = {name: resolve(folder) for name, folder in zip(FOLDERS, given, strict=True)}
    typer.echo(write_report(folders, executed=resolve(executed), out=resolve(out)))


@app.command()
def explore() -> None:
    """Open the explorer in JupyterLab."""
    quiet = ("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None")
    notebook = ROOT / "notebooks" / "explore.ipynb"
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *quiet, str(notebook)])


@app.command()
def keys(
    parties: Annotated[list[str], typer.Argument(help="server, client-0, client-1, ...")],
    host: Annotated[list[str] | None, typer.Option(help="A name or address at which clients reach the server.")] = None,
    days: Annotated[int, typer.Option(help="Until the certificates expire.")] = 365,
    revoke: Annotated[bool, typer.Option(help="Revoke what these parties have.")] = False,
    folder: Annotated[Path, typer.Option(help="The folder of keys.")] = KEYS,
) -> None:
    """Issue certificates for training between machines, or revoke them; each party's folder goes to its machine."""
    _needs_remote()
    from splitlab.split.remote import keys as authority

    place = resolve(folder)
    if revoke:
        changed = [certificate for party in parties for certificate in authority.revoke(place, party)]
    else:
        changed = authority.make_keys(place, parties, hosts=host or (), days=days)
    for certificate in changed:
        word = "revoked" if certificate.revoked else f"valid until {certificate.expires}"
        typer.echo(f"{place / certificate.party}: {word} ({certificate.serial})")


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="A run of params/split.yaml, of scheme split.")],
    broker: Annotated[str | None, typer.Option(help="host:port of a broker that runs already.")] = None,
    listen: Annotated[str, typer.Option(help="host:port where the broker that is started listens.")] = "127.0.0.1:0",
    folder: Annotated[Path, typer.Option("--keys", help="The folder of keys; made where there is none.")] = KEYS,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; else runs/RUN-remote.")] = None,
    gigabytes: Annotated[float, typer.Option(help="What the stream may take on disk.")] = 4.0,
    keep: Annotated[bool, typer.Option(help="Keep what was trained on: the stream is the transcript.")] = True,
) -> None:
    """Train a run on what clients on other machines send (`splitlab join`); repeat it after whatever ended it."""
    _needs_remote()
    from splitlab.params import load_params, load_split
    from splitlab.split.remote import keys as authority
    from splitlab.split.remote.server import serve as serve_run
    from splitlab.split.remote.trainer import Run

    params = load_params()
    config, base = _remote_run(run, params)
    plan = Run(run, config, base, load_split(config.dataset, "public", params, limit=1).size)
    place = resolve(folder)
    if not (place / "issued.json").exists():
        authority.make_keys(place, ["server", *(f"client-{number}" for number in range(config.n_clients))])
    target = resolve(out or Path("runs", f"{run}-remote"))
    options: dict[str, Any] = {"broker": broker, "listen": listen, "max_bytes": int(gigabytes * 1e9), "keep": keep}
    serve_run(plan, place, out=target, folder=CACHE / "remote" / run, **options)
    typer.echo(target)


@app.command()
def join(
    run: Annotated[str, typer.Argument(help="The run, as the server has it in its params/split.yaml.")],
    client: Annotated[int, typer.Option(help="This client's number, from 0.")] = 0,
    data: Annotated[str | None, typer.Option(help="Its private data set; else its share of the run's.")] = None,
    broker: Annotated[str | None, typer.Option(help="host:port of the broker; else the one on this machine.")] = None,
    folder: Annotated[Path | None, typer.Option("--keys", help="This client's own folder of keys.")] = None,
    turns: Annotated[int | None, typer.Option(help="Messages to send in all; else its share of the run.")] = None,
) -> None:
    """Send a client's messages to a run's server (`splitlab serve`); repeat it after whatever ended it."""
    _needs_remote()
    from splitlab.params import load_params, load_split
    from splitlab.split.remote.client import join as join_run
    from splitlab.split.remote.client import remote_client
    from splitlab.split.remote.trainer import Run

    params = load_params()
    config, base = _remote_run(run, params)
    if data is not None and config.published_key is not None:
        raise InputError(
            f"run {run}: its draws follow from a published key, so that anybody can take its noise off; "
            "for data of your own, name a run without published_key"
        )
    private = load_split(data or config.dataset, "private", params)
    plan = Run(run, config, base, private.size)
    sender, secret = remote_client(plan, client, private, cache=CACHE, share=data is None)
    with _link(run, broker, folder or KEYS / f"client-{client}") as link:
        sent = join_run(plan, sender, link, secret=secret, turns=turns)
    typer.echo(f"{sent} messages sent, every one acknowledged")


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The run.")],
    broker: Annotated[str | None, typer.Option(help="host:port of the broker; else the one on this machine.")] = None,
    folder: Annotated[Path, typer.Option("--keys", help="The server's or a client's own folder.")] = KEYS / "server",
    as_json: AsJson = False,
) -> None:
    """Say how a run between machines stands: samples, MB/s, what waits, what was acknowledged and refused."""
    _needs_remote()
    from splitlab.split.remote import status as state

    with _link(run, broker, folder, patience_s=5.0) as link:
        told = state.status(run, link)
    if as_json:
        _print_json(told)
    else:
        typer.echo("\n".join(state.lines(run, told)))


def _needs_remote() -> None:
    if importlib.util.find_spec("nats") is None or importlib.util.find_spec("cryptography") is None:
        raise InputError("training between machines needs more packages: run pip install -e '.[remote]'")


def _remote_run(run: str, params: dict[str, Any]) -> tuple[Any, Any]:
    """Return a run's configuration and base model."""
    from splitlab.core.config import parse
    from splitlab.diffusion.base import load_base
    from splitlab.params import section
    from splitlab.split.config import TrainConfig

    return parse(TrainConfig, section(params, "runs", run), where=f"runs.{run}"), load_base(params["base"]["source"])


def _link(run: str, broker: str | None, folder: Path, patience_s: float = 3600.0) -> Any:
    """Connect to the broker that is named, or to the one that `serve` started on this machine."""
    from splitlab.split.remote.link import Link

    path = CACHE / "remote" / run / "address"
    if broker is None and not path.exists():
        raise InputError(f"run {run}: no server on this machine; give --broker, or start `splitlab serve {run}`")
    return Link(broker or path.read_text().strip(), resolve(folder), patience_s=patience_s)


def _facts(result: Any) -> dict[str, Any]:
    """Return what an attack on updates tells in few numbers and words: all but images, tensors of them, and history."""
    names = ("attack", "timesteps", "prompts", "class_labels", "scale", "evidence", "final", "n_evals", "cpu_s")
    facts = {}
    for name in (*names, "unexplained", "warnings"):
        value = getattr(result, name, None)
        plain = value.tolist() if hasattr(value, "tolist") else value  # type: ignore[union-attr]
        if plain not in (None, (), []):
            facts[name] = plain
    return facts


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(_written(content), indent=1, ensure_ascii=False))


def _written(value: Any) -> Any:
    """Return a value as JSON can say it: a number that is missing is null, an infinite one the word."""
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    return value


if __name__ == "__main__":
    app()
