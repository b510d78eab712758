"""A text of the model in training.

The engine of `slope generate` would hold a second copy of the weights beside gradients and moments, and cannot read
weights that are split over processes. A text is short, and a step of few tokens waits for launches anyway; so each
token is taken from a forward pass of the whole text, by the training model as it is.

Shape suffixes: T positions.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.inference.sampling import Sampling, Settings, choose, mode_of
from slope_cli.inference.text import prompt_ids
from slope_cli.models.loss import forward
from sparse_kernels import dense_weights


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, sampling: Sampling, dtype: torch.dtype
) -> str:
    """The prompt and its continuation, up to the end of a text or the last position; the same on every rank.

    dtype: of the products. The prompt has a token at least, and fewer than there are positions.
    """
    device = model.device
    ids_1T = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    settings, mode = Settings.of([sampling], device), mode_of([sampling], model.config.vocab_size)
    begin, training = ids_1T.shape[1], model.training
    model.eval()
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), cast, dense_weights(model, dtype):
        for place in range(begin, min(begin + sampling.tokens, model.config.max_position_embeddings)):
            logits_1V = forward(model, {"input_ids": ids_1T}).logits[:, -1].float()
            token_1 = choose(logits_1V, settings, torch.tensor([place], device=device), mode)
            ids_1T = torch.cat([ids_1T, token_1[:, None]], dim=1)
            if token_1.item() == tokenizer.eos_token_id:
                break
    model.train(training)
    return str(tokenizer.decode(ids_1T[0], skip_special_tokens=True))
