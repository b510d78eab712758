"""Softmax attention turned into window softmax plus linear attention with a state of constant size (LoLCATs).

settings.py   what a linearized model is: window, feature map, layers left as they are; imports no torch
maps.py       the learned feature maps, Hedgehog and T2R
attention.py  the mathematics, chunked: no modules, no transformers
decode.py     one token at a time, in place
window.py     LinearWindow, the module that each attention layer gets, with its maps and mix factors
cache.py      the layer of transformers' cache that holds one LinearWindow's memory
swap.py       linearize_attention and its inverse; the attention function that transformers calls; branch and mode
transfer.py   stage 1's losses, each layer's backward inside the forward pass
step.py       an optimizer step of stage 1, each layer's gradient clipped by itself
base.py       the model that a run linearizes, as the run's folder describes it, and rebuilt
plan.py       what `slope linearize` starts from, and its dry run
saved.py      what linearizing added, as a folder of an export
"""
