"""Text from a trained causal model."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.data.tokenizer import begin_id
from slope_cli.errors import UsageError, is_utf8
from slope_cli.linearize.swap import using
from slope_cli.models import shapes
from sparse_kernels import dense_weights


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt as text begins in training: after the beginning of text, if the tokenizer puts one there.

    No end of text follows, even if the tokenizer adds one: the text is to be continued. UsageError for no text.
    """
    if not is_utf8(prompt):
        raise UsageError("prompt: is not text in UTF-8")
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    begin = begin_id(tokenizer)
    return ids if begin is None else [begin, *ids]


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """The prompt and its continuation, sampled; with temperature 0 always the likeliest token.

    Args:
        tokens: how many to add at most; fewer where the model's positions end.
        compiled: compile linearized attention's decoding step; pays off for many tokens, or texts, on a GPU.
        dtype: of the products; None for bf16 on a GPU, and float32 elsewhere.

    Raises:
        UsageError: an empty prompt where texts begin with no token of their own, one that fills the model's positions,
            or a model that cannot continue text.
    """
    if shapes.objective(model.config) == "masked":
        raise UsageError(f"{type(model).__name__}: predicts masked tokens and cannot continue text; use a causal model")
    ids_1T = torch.tensor([prompt_ids(tokenizer, prompt)], dtype=torch.long, device=model.device)
    length, positions = ids_1T.shape[1], model.config.max_position_embeddings
    if length == 0:
        raise UsageError("prompt: is empty; give some text to continue")
    if length >= positions:
        raise UsageError(f"prompt: has {length} tokens and the model only {positions} positions; shorten it")
    training = model.training
    model.eval()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    device = model.device.type
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    cast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), cast, using(model, compiled=compiled), dense_weights(model, dtype):
        out_1T = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=min(tokens, positions - length),
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    model.train(training)
    return str(tokenizer.decode(out_1T[0], skip_special_tokens=True))
