"""Softmax attention turned into window softmax plus linear attention with a state of constant size (LoLCATs).

A transformation of models, independent of runs:

maps.py              the learned feature maps, Hedgehog and T2R
gate.py              the gate of a gated state
delta.py             the delta rule, and attention with its state
linear_attention.py  the mathematics of a layer, in chunks: no modules, no transformers
exact_cache.py       the same with an exact cache
decode.py            the same for one token at a time, in place
linear_window.py     LinearWindow, the module that each attention layer gets, with its maps and mix factors
cache.py             the layer of transformers' cache that holds one LinearWindow's state
swap.py              linearize_attention and its inverse; the attention function of transformers; branch and mode
transfer.py          the losses of attention transfer, each layer's backward inside the forward pass
layer_range.py       a model with a range of its layers alone
hidden_states.py     the hidden states between two ranges, on disk
saved.py             what linearizing added, as a folder of an export
"""
