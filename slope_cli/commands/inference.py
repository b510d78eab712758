"""Commands that use a trained model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from slope_cli.commands.options import AsJson, Model, print_result
from slope_cli.config.section import MAX_WHOLE
from slope_cli.distributed import launch
from slope_cli.errors import UsageError, missing

ExportFormat = Literal["dense", "packed"]
WeightDtype = Literal["bfloat16", "float16", "float32"]


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Default: lines of standard input, or a terminal's.")
    ] = None,
    batch: Annotated[Path | None, typer.Option(help='Prompts: one a line, or .jsonl with {"prompt": …}.')] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that reach this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_WHOLE, help="Another one gives another text.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Texts of each prompt, with the seeds from --seed on.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template; prompts are the user's.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the system says first.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile linearized attention; for a GPU.")] = False,
    as_json: AsJson = False,
) -> None:
    """Generate text: continue prompts, or chat.

    With --chat on a terminal a conversation goes on until an empty line, which begins a new one.
    """
    launch.require_one_process()
    from slope_cli.inference import generate as generating
    from slope_cli.inference.sampling import Sampling

    sampling = Sampling(tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
    device = launch.pick_device("auto")
    how: dict[str, Any] = {"samples": samples, "chat": chat, "system": system, "compiled": compiled, "as_json": as_json}
    generating.generate(model, prompt, batch, sampling, device, **how)


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, which the log names.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts that are continued at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that wait besides; more are refused.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text and its prompt; default: the model's positions.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running texts have when a signal comes.")] = 30.0,
) -> None:
    """Serve a model over HTTP, by OpenAI's interface.

    It ends by SIGINT or SIGTERM. $SLOPE_API_KEY is the key that requests must bring, if it is set.
    """
    launch.require_one_process()
    try:
        from slope_cli.serving import server
    except ModuleNotFoundError as error:
        raise missing("slope serve", error.name, "serve") from None

    limits = server.Limits(max_batch, max_queue, max_length, grace)
    server.serve(model, host, port, dtype, launch.pick_device("auto"), limits)


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN[@STEP]|DIR", help="A run; packed also a folder of any 2:4 model.")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A new or empty folder; without it DIR is pushed as it is.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapters into weights, now dense.")] = False,
    form: Annotated[ExportFormat, typer.Option("--format", help="dense: with zeros; packed: for inference.")] = "dense",
    dtype: Annotated[
        WeightDtype | None, typer.Option(help="Of the weights; default: float32, packed bfloat16.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="NAMESPACE/NAME", help="Upload OUT to the Hugging Face Hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a repository that everyone sees.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder that transformers loads.

    What is written is read back, and its logits are compared. Adapters are a folder for PEFT beside dense weights. For
    a linearized run only slope loads the feature maps, and the check uses slope; from_pretrained gives plain softmax
    attention. With --format packed 2:4 layers are kept values and metadata, with their adapters, for inference: loaded
    by slope, or after import sparse_kernels.transformers. A repository that --push makes is private.
    """
    launch.require_one_process()
    if public and push is None:
        raise UsageError("--public: is for --push")
    if folder is None and push is None:
        raise UsageError("OUT is missing: the folder to write; only --push does without it, for a folder to upload")
    if folder is None:
        for option, given in (("--merge", merge), ("--format", form == "packed"), ("--dtype", dtype is not None)):
            if given:
                raise UsageError(f"{option}: is for an export; give OUT, the folder to write")
    if form == "packed" and merge:
        raise UsageError("--merge: packed layers are 2:4, and merged ones are not; leave it out")
    result: dict[str, Any] = {}
    lines: list[str] = []
    if push is not None:
        from slope_cli.inference import push as pushing

        if folder is None:
            pushing.require_export(run)
        pushing.require_hub(push)  # before the export, which may take long
    if folder is not None and form == "packed":
        from slope_cli.inference.export_packed import export_packed, report_lines

        result = export_packed(run, folder, dtype or "bfloat16")
        lines = report_lines(result)
    elif folder is not None:
        from slope_cli.inference import export as exporting

        result = exporting.export(run, folder, merge=merge, dtype_name=dtype or "float32")
        lines = exporting.report_lines(result)
    if push is not None:
        result["pushed"] = pushing.push(folder or run, push, public=public)
        lines.append(f"pushed to {result['pushed']}, {'public' if public else 'private'}")
    print_result(result, lines, as_json)


def convert_llama2c(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A llama2.c checkpoint, version 0.")],
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="Its tokenizer's .bin file.")],
    out: Annotated[Path, typer.Option(help="An empty or new folder.")],
    as_json: AsJson = False,
) -> None:
    """Convert a llama2.c model for transformers."""
    from slope_cli.benchmarks.llama2c import convert

    sizes = convert(model, tokenizer, out)
    text = f"{sizes['parameters']:,} parameters, {sizes['layers']} layers, {sizes['vocabulary']} ids"
    print_result(sizes, [f"{out}: {text}, {sizes['positions']} positions"], as_json)
