"""A run's folder as something to hand on: its model card, and its way to the Hugging Face hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tithe.app.terminal import human
from tithe.errors import TitheError
from tithe.files import replacing

CARD = "README.md"
KEPT_HERE = ("checkpoints/*", "history/*", "tensorboard/*", "pictures.json", ".*")
"""What of a run's folder is of no use to others."""


def write_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the model card: what was trained, on what, how well it does, what it took, and how to use it.

    Args:
        folder: of the run.
        result: what its `result.json` holds.
    """
    recipe, delta = result["recipe"], Path(result["files"]["delta"]).name
    model, data, method = recipe["model"], recipe["data"], recipe["method"]
    base = model["pretrained"] or model["timm"] or model["callable"]
    scratch = model["scratch"] is not False
    told = base or f"a {model['scratch']['model_type']} from scratch"
    head = ["---", "library_name: tithe", f"tags: [{data['task']}, {method['name']}]"]
    if _is_id(base) and not scratch:
        head.append(f"base_model: {base}")
    lines = [*head, "---", "", f"# {folder.name}", ""]
    trained = result["trainable"]
    lines += [
        f"{told}{' (fresh weights)' if scratch and base else ''}, trained for {data['task']} by the method"
        f" `{method['name']}` of Tithe: {trained['total']:,} of {trained['model']:,} weights"
        f" ({trained['fraction']:.2%}) were trained.",
        "",
        "| measured | |",
        "|---|---|",
    ]
    for split, values in result["metrics"].items():
        lines += [f"| {name}, {split} split | {value:.4f} |" for name, value in values.items()]
    sizes, seconds = result["bytes"], result["seconds"]
    facts = {
        "steps": f"{result['steps']:,}, the best of them {result['best_step']}",
        "rows": ", ".join(f"{count:,} {split}" for split, count in result["rows"].items()),
        "file": human(sizes["delta"]),
        "optimizer's state": human(sizes["optimizer"]),
        "time": f"{seconds['training']:.1f} s on {result['device']}, {seconds['per_step'] * 1e3:.0f} ms a step",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "date": result["date"],
    }
    if sizes["peak"] is not None:
        facts["peak of a step"] = f"{human(sizes['peak'])} beyond the model"
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += [f"| note | {note.replace('|', '/')} |" for note in result["notes"]]
    lines += ["", "The rows of validation chose the step; `result.json` holds the recipe and all numbers.", ""]
    lines += ["## Use", ""]
    if scratch and not result["widths"]:
        lines += ["`model/` holds the whole model, as its own library reads it.", ""]
    elif base is not None:
        lines += ["```python", "import tithe", "", f"tithe.apply(model, {delta!r})  # model: {base}", "```", ""]
    lines += ["On other rows: `tithe predict FOLDER FILE`, where the recipe's base is at hand.", ""]
    with replacing(folder / CARD) as file:
        file.write_text("\n".join(lines), encoding="utf-8")


def _is_id(base: object) -> bool:
    return isinstance(base, str) and base.count("/") <= 1 and not base.startswith((".", "/", "~", "package:"))


def check_repo(repo: str) -> None:
    """Check the name of a repository before a run begins.

    Raises:
        TitheError: it is no name of the hub.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise TitheError(
            "--push", found=f"{repo!r}: {str(error).splitlines()[0]}", expected="NAME/MODEL", remedy="correct the name"
        ) from error


def by_hand(folder: Path, repo: str) -> str:
    """The commands that do what `push` does."""
    excluded = [part for pattern in KEPT_HERE for part in ("--exclude", pattern)]
    return "hf auth login\n  " + shlex.join(["hf", "upload", repo, str(folder), ".", *excluded])


def push(folder: Path, repo: str) -> str | None:
    """Upload a run's folder to the Hugging Face hub, where a token is present.

    Args:
        folder: of the finished run.
        repo: the name there; it is made if it does not exist.

    Returns:
        Where it is now; None where there is no token, and nothing was done.

    Raises:
        TitheError: the hub refuses, or is not reached; the run's folder is as it was.
    """
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        return None
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=list(KEPT_HERE),
            commit_message="Upload a run of tithe train",
        )
    # No network, no right to write there, a name that belongs to somebody else …
    except Exception as error:
        raise TitheError(
            f"--push {repo}",
            found=(str(error).strip().splitlines() or [type(error).__name__])[0],
            expected="a repository that this token may write to",
            remedy=f"the run is finished and whole; once the hub takes it: {by_hand(folder, repo)}",
        ) from error
    return str(url)
