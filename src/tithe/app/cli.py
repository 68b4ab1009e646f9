"""The command line: `tithe demo · train · predict · price · average · merge · inspect`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

from tithe.errors import TitheError

try:
    import typer

    from tithe.app import terminal
except ModuleNotFoundError as error:
    raise SystemExit(f"The command line needs {error.name}: pip install 'tithe[train]'") from error

app = typer.Typer(
    name="tithe",
    help="""Train a tithe of the network; pay a tithe of the memory.

    Start with `tithe demo`; then write a recipe and `tithe train` it.""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": terminal.WIDTH},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print_json(data: dict[str, Any]) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


@contextlib.contextmanager
def _guarded(interrupted: str = "stopped: nothing was written") -> Generator[None]:
    """Turn what went wrong into one message and an exit code: 2 refused, 3 not finite, 130 interrupted."""
    try:
        yield
    except TitheError as error:
        _say(f"error: {error}")
        raise typer.Exit(3 if type(error).__name__ == "NotFiniteError" else 2) from None
    except ModuleNotFoundError as error:
        if (error.name or "tithe").startswith("tithe"):
            raise
        _say(f"error: the package {error.name} is not installed. Remedy: pip install 'tithe[train]'")
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        _say(f"error: {_told(error)}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _say(interrupted)
        raise typer.Exit(130) from None


def _told(error: OSError) -> TitheError:
    """What the system says of a file, or of standard output where it names none."""
    found = error.strerror or str(error)
    if error.filename is not None:
        return TitheError(
            str(error.filename), found=found, expected="a file that can be used", remedy="check the path, or the disk"
        )
    # What is left in the buffer would fail again when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return TitheError(
        "standard output", found=found, expected="a place that takes what is printed", remedy="send it to another file"
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.", metavar="RECIPE.toml")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data files: [data] folder, from here.", metavar="FOLDER")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a key of the recipe; repeatable.", metavar="KEY=VALUE")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload the run's folder to the Hugging Face hub.", metavar="NAME/MODEL")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Ctrl-C finishes the step, saves, and says how to go on. On several
    processes: torchrun --nproc-per-node 2 -m tithe train RECIPE.toml

    \b
    Example:
      tithe train examples/sst2_minilm.toml
      tithe train examples/digits_trady.toml
      tithe train examples/digits_vrpge.toml
      tithe train examples/digits_twa.toml
      tithe train examples/bytes_lm.toml
      tithe train examples/sst2_minilm.toml --set run.seed=1 --set run.epochs=1
      tithe train recipe.toml --push NAME/MODEL

    \b
    A whole recipe:
      [model]
      pretrained = "bert-base-uncased"  # or a folder, or timm = "resnet18"
      [data]
      task = "text-classification"      # the other tasks: below
      train = "train.tsv"               # TSV, CSV, JSONL, parquet
      test = "test.tsv"
      text = "sentence"
      [method]
      name = "fish"                     # or trady, vrpge, full, head
      density = 0.005
      [optimizer]
      lr = 1e-3                         # left out, one is suggested
      [run]
      epochs = 3
      output = "runs/first"

    \b
    Under a budget, drawn anew each epoch, and the other layers lean:
      [method]
      name = "trady"
      budget = "2MB"                    # or {elements = 27946},
      ranking = "net.json"              #    {fraction = 0.01}; the ranking
                                        #    is measured where none is given
      [optimizer]
      lr = 0.1                          # SGD without momentum, cosine, as in
                                        #    the paper; name = "adamw" is
                                        #    charged to the budget
    Record checkpoints, and end with the average of them, trained:
      [history]
      every = "epoch"                   # or a number of steps
      bits = 8                          # or 4, 1; left out: whole
      [average]
      epochs = 10                       # method = "mean" trains nothing
      lr = 2.0                          # on = "held_out": rows that the
                                        #    run itself does not see
    End a constant rate with an average in the place of a decay:
      [history]
      every = 50
      start = 0.8                       # the last fifth of the run
      [average]
      like = "cosine"                   # or "linear", "sqrt"
    A language model, on plain text or on chats:
      [data]
      task = "causal-lm"
      train = "book.txt"                # or a folder, or JSONL with
      packing = true                    #    messages = "messages"
      max_length = 512
    The other tasks, with the columns that they read unless told otherwise:
      text-regression                   # text, label: a number
      multi-label                       # text, labels: a list, or "a,b"
      token-classification              # tokens, tags: lists of one length
      seq2seq                           # source, target: two texts
      image-classification              # train = a folder of class folders
    Another column: text = "words", label = "ner_tags".
    Rows that are read while training goes on, of any size:
      [data]
      dataset = "corpus"                # a folder of JSONL or parquet
      streaming = true                  #    files, or a data set of the hub
      validation = "validation"
      [run]
      steps = 10000                     # not epochs
    From nothing: scratch = true beside pretrained or timm, or
      [model]
      tokenizer = "bytes"
      scratch = {model_type = "llama", hidden_size = 64, ...}
    Also in [run]: patience = 3 ends a run that gets no better,
    gradient_checkpointing = true runs blocks again in the backward
    pass. [log] trackers = ["tensorboard", "wandb", ...] logs to them.
    Any method: lean = true lets the layers that are not trained keep
    for backward only what it needs; lean_bits = 8 codes attention and
    norms in 8 bits, lean_exact = true keeps smooth activations exact.
    """  # noqa: D301
    with _guarded("stopped before the first checkpoint: nothing is saved"):
        from tithe.app.train import read_recipe
        from tithe.app.train import train as run

        settings = list(overrides or [])
        if data is not None:
            settings.append(f"data.folder={json.dumps(str(data.resolve()))}")
        checked = read_recipe(recipe, settings)
        if push is not None:
            from tithe.app.train.sharing import check_repo

            check_repo(push)

        from tithe.app.train.report import show
        from tithe.app.train.signals import Interrupted

        try:
            result = run(checked, resume=resume, console=terminal.console(stderr=True))
        except Interrupted as stop:
            if os.environ.get("RANK", "0") == "0":
                again = ["tithe", "train", str(recipe), "--resume"]
                again += ["--data", str(data)] if data is not None else []
                again += [part for override in overrides or [] for part in ("--set", override)]
                _say(f"{stop}. To go on:\n  {shlex.join(again)}")
            raise typer.Exit(130) from None
        if os.environ.get("RANK", "0") != "0":
            return
        if as_json:
            _print_json(result)
        else:
            show(result, terminal.console())
        if push is not None:
            from tithe.app.train.sharing import by_hand
            from tithe.app.train.sharing import push as upload

            told = upload(checked.output, push)
            _say(
                f"pushed: {told}"
                if told
                else f"no token of the hub, so not pushed. By hand:\n  {by_hand(checked.output, push)}"
            )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN")],
    file: Annotated[Path, typer.Argument(help="Rows to answer.", metavar="FILE")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .csv, .tsv, .jsonl or .json file.", metavar="OUT")
    ] = None,
    tokens: Annotated[int, typer.Option(help="A language model writes at most.", metavar="N", min=0)] = 64,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="How FILE is read; repeatable.", metavar="data.KEY=VALUE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a finished run answer the rows of a file.

    FILE is a table as the run was trained on; labels are not needed, and
    are scored where they are there. Of images it is a picture or a folder
    of pictures. The answers are printed as CSV, unless --output names a
    file. A language model goes on with each text, or answers each chat.

    \b
    Example:
      tithe predict runs/first new.csv
      tithe predict runs/first new.jsonl -o answers.jsonl
      tithe predict runs/first new.csv --json
      tithe predict runs/first new.csv --set data.text=body
    """  # noqa: D301
    with _guarded():
        from tithe.app.train.predicting import predict as answer

        with terminal.Bar(terminal.console(stderr=True), patience=2.0) as bar:
            found = answer(run, file, output=output, new_tokens=tokens, overrides=overrides or (), progress=bar.count)
            for note in found.notes:
                bar.say(note)
        if as_json:
            _print_json(found.as_dict())
            return
        told = "  ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
        if told:
            _say(told)
        if output is None:
            typer.echo(found.table(), nl=False)
        else:
            typer.echo(f"written: {output}")


@app.command()
def price(
    model: Annotated[str, typer.Argument(help="A folder, model type, recipe or callable.")],
    image: Annotated[str | None, typer.Option(help="An image.", metavar="CxHxW")] = None,
    tokens: Annotated[int | None, typer.Option(help="Length of a text.", metavar="N", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Samples in a step.", metavar="N")] = 8,
    budget: Annotated[str, typer.Option(help="What sparse methods may train.", metavar="1%|2MB|N")] = "1%",
    memory: Annotated[str | None, typer.Option(help="What everything has to fit into.", metavar="SIZE")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Price this one; repeatable.", metavar="NAME")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or momentum.", metavar="NAME")] = "adamw",
    rank: Annotated[int, typer.Option(help="Of LoRA's matrices.", metavar="N")] = 8,
    checkpoints: Annotated[int, typer.Option(help="That TWA averages.", metavar="N", min=1)] = 100,
    labels: Annotated[int | None, typer.Option(help="Outputs of the head.", metavar="N", min=1)] = None,
    language_model: Annotated[bool, typer.Option("--language-model", help="Predict every next token.")] = False,
    dtype: Annotated[str, typer.Option(help="Of weights and inputs.", metavar="NAME")] = "float32",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A key of its configuration; repeatable.", metavar="KEY=VALUE")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw stacked bars.", metavar="FILE.png")] = None,
    as_json: Json = False,
) -> None:
    """Say what training would take by each method, without loading the model.

    MODEL is a folder with a config.json, package:NAME/FOLDER, a transformers
    model type such as vit (its default size), an id of the Hugging Face hub
    that was downloaded, timm:NAME, package.module:callable, or RECIPE.toml.
    What --method names is priced, or all but VR-PGE, TWA and columns. Names:
    full, full+lean, full+ckpt, head, lora, lora+lean, lora+ckpt, qlora,
    fish, fish+lean, fish-columns, trady, spiel, vrpge, twa.

    \b
    Example:
      tithe price mobilenet_v2 --image 3x224x224 --batch 8
      tithe price bert --tokens 128 --batch 16 --memory 2GB
      tithe price llama --language-model --dtype bfloat16 --method trady \\
        --set hidden_size=2048 --set num_hidden_layers=16
      tithe price examples/sst2_minilm.toml --plot price.png
    """  # noqa: D301
    with _guarded():
        from tithe import Budget
        from tithe.app import price as prices

        shape = prices.Shape(
            image=None if image is None else prices.Shape.parse_image(image),
            tokens=tokens,
            labels=labels,
            language_model=language_model,
            dtype=dtype,
        )
        terms = prices.Terms(
            budget=prices.parse_budget(budget), rank=rank, optimizer=optimizer, checkpoints=checkpoints
        )
        limit = None if memory is None else Budget(memory).bytes
        with terminal.Bar(terminal.console(stderr=True), patience=5.0) as bar:
            quotes = prices.price(
                prices.outline(model, shape, settings or ()),
                batch=batch,
                methods=tuple(method or prices.USUAL),
                terms=terms,
                memory=limit,
                progress=bar.phase,
            )
        if plot is not None:
            prices.plot(quotes, plot)
        if as_json:
            _print_json(quotes.as_dict())
        else:
            prices.show(quotes, terminal.console())


@app.command()
def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints, or a folder of them.", metavar="CKPT")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder or file.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Of tithe train: model, data, metric.", metavar="RECIPE.toml")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data files: [data] folder, from here.", metavar="FOLDER")
    ] = None,
    method: Annotated[
        str, typer.Option(help="What is written: best, mean, ema, greedy, twa-t, twa-v.", metavar="NAME")
    ] = "auto",
    weights: Annotated[str | None, typer.Option(help="One a checkpoint, such as 0.2,0.8.", metavar="X,…")] = None,
    decay: Annotated[float | None, typer.Option(help="Of ema; 0.9 by itself.", metavar="X")] = None,
    like: Annotated[
        str | None,
        typer.Option(help="A decay of the rate: linear, cosine, sqrt; or ema:0.08.", metavar="NAME"),
    ] = None,
    last: Annotated[int | None, typer.Option(help="Checkpoints that the decay covers.", metavar="N")] = None,
    bits: Annotated[int | None, typer.Option(help="Of TWA's basis: 8, 4 or 1.", metavar="N")] = None,
    granularity: Annotated[
        str | None, typer.Option(help="TWA's coefficients: tensor or model.", metavar="NAME")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="TWA trains for; 5 by itself.", metavar="N")] = None,
    lr: Annotated[float | None, typer.Option(help="TWA's; two are tried by itself.", metavar="X")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the coefficients.", metavar="FILE.png")] = None,
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged", help="Leave out what cannot be read.")] = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints, in the format they have, without loading them.

    CKPT is a safetensors file, a Hugging Face folder, a .pt or .ckpt file,
    a delta, a folder of one of these, or a history that a run recorded.

    With a recipe, every way to average is tried: a table says what each
    gives on the test split, which is not used for choosing, and the best
    on the validation split is written, or the one that --method names.

    --like makes of checkpoints of a constant learning rate what a decay
    over the last N of them would have: linear, cosine or sqrt. Of moving
    averages that a run recorded it makes one of any width: ema:0.08.

    \b
    Example:
      tithe average runs/*.safetensors -o mean.safetensors
      tithe average run/checkpoint-* -o ema --method ema --decay 0.9
      tithe average one.pt two.pt -o both.pt --weights 0.2,0.8
      tithe average run/history -o end.safetensors --like cosine --last 20
      tithe average tuned/* -o soup --recipe mrpc.toml --plot soup.png
    """  # noqa: D301
    with _guarded():
        from tithe.app import average as averages

        told = {"method": method, "decay": decay, "like": like, "last": last}
        told |= {"bits": bits, "granularity": granularity, "epochs": epochs, "lr": lr}
        result = averages.run(
            checkpoints,
            output,
            recipe=recipe,
            data=data,
            weights=weights,
            told={name: value for name, value in told.items() if value is not None},
            skip_damaged=skip_damaged,
            figure=plot,
            console=terminal.console(stderr=True),
        )
        if as_json:
            _print_json(result.as_dict())
        else:
            averages.show(result, terminal.console())


@app.command()
def merge_tasks(
    base: Annotated[Path, typer.Argument(help="What all were fine-tuned from.", metavar="BASE")],
    checkpoints: Annotated[list[Path], typer.Argument(help="The fine-tuned models.", metavar="CKPT")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder or file.")],
    method: Annotated[str, typer.Option(help="ties or iso-c.", metavar="NAME")] = "ties",
    weights: Annotated[str | None, typer.Option(help="One a checkpoint; 1 by itself.", metavar="X,…")] = None,
    density: Annotated[
        float | None, typer.Option(help="Of ties: the share of changes kept, 0.2 by itself.", metavar="X")
    ] = None,
    scale: Annotated[float, typer.Option(help="Of the merged change.", metavar="X")] = 1.0,
    as_json: Json = False,
) -> None:
    """Merge fine-tunings of one base for several tasks into one model.

    What each fine-tuning changed is merged, one tensor at a time, and
    added to the base. ties keeps the largest changes of each and settles
    conflicts of sign; iso-c gives all directions of the sum one strength.
    Choose --scale by validation data: 0.5 to 1.5 is usual.

    \b
    Example:
      tithe merge-tasks base tuned/sst2 tuned/mrpc -o both
      tithe merge-tasks base tuned/* -o merged --method iso-c --scale 1.2
    """  # noqa: D301
    with _guarded():
        from tithe.app import average as averages

        result = averages.merge(
            base,
            checkpoints,
            output,
            method=method,
            weights=weights,
            density=density,
            scale=scale,
            console=terminal.console(stderr=True),
        )
        if as_json:
            _print_json(result.as_dict())
        else:
            averages.show(result, terminal.console())


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The model that was fine-tuned: a folder, a file or an id.")],
    deltas: Annotated[list[Path], typer.Argument(help="Deltas made from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder or file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let later deltas win where two disagree.")] = False,
    as_json: Json = False,
) -> None:
    """Write an ordinary checkpoint: the base with deltas applied.

    BASE is a folder or a Hugging Face id (then OUT is a folder that
    from_pretrained reads), or one .safetensors file (then OUT is one too).

    \b
    Example:
      tithe merge bert-base-uncased runs/first/delta.safetensors -o tuned
    """  # noqa: D301
    with _guarded():
        from tithe.app.train.merging import merge_deltas

        path = merge_deltas(base, deltas, output, overwrite=overwrite)
        if as_json:
            _print_json({"base": base, "deltas": [str(delta) for delta in deltas], "output": str(path)})
        else:
            typer.echo(f"written: {path}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A delta.", metavar="FILE")],
    as_json: Json = False,
) -> None:
    """Say what is in a delta: which tensors, how many values, from which method.

    \b
    Example:
      tithe inspect runs/first/delta.safetensors
    """  # noqa: D301
    with _guarded():
        import tithe

        info = tithe.inspect(file)
        if as_json:
            _print_json(info.as_dict())
        else:
            typer.echo(str(info))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the table and the figure.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of networks and batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: seconds, and rougher numbers.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a small network on embedded images with every method.

    Two to four minutes on two cores, without a network or a download.

    \b
    Example:
      tithe demo
      tithe demo --quick --json
    """  # noqa: D301
    with _guarded():
        from tithe.app import demo as demo_run

        # With --json the demo_run's own table goes to stderr: stdout carries the JSON alone.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = demo_run.run(output, seed=seed, quick=quick)
        if as_json:
            _print_json(result)
