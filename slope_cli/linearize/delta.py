"""The delta rule: a state that is corrected by each key, instead of added to (arXiv 2406.06484, 2412.06464).

    S_j = g_j · (I - beta_j k_j^T·k_j) · S_j-1 + beta_j k_j^T·v_j        0 < beta_j < 1, |k_j| = 1

One step of gradient descent on |k_j·S - v_j|^2, of size beta_j, from a state that is decayed by g_j (see `gate`): what
S says of a key is moved towards the key's value, and what it says of keys at right angles stays. So an unnormalised
read q·S is of the size of values, where a sum's grows with the text and needs a denominator.

In chunks of C the rule is u_j = beta_j (v_j - g_j k_j·S_j-1), with which S_j = g_j S_j-1 + k_j^T·u_j is a decayed sum.
All u of a chunk, as functions of the state before it, are one triangular solve (the WY representation); that state is
the only thing that goes from chunk to chunk.

Attention is then the softmax over the window, y_n, and beside it what the far keys say:

    (1 - lambda_n) · y_n + lambda_n · phi(q_n)·S        0 < lambda_n < 1, and 0 where no key is far

phi is a learned matrix of each head and a length of 1, as in these papers, whose q and k are projections that are
trained for it; those of a model that learned softmax attention are not. lambda_n and beta_j are sigmoids of linear
functions of q_n and k_j. A lambda_n that also depends on the window's scores, as the far keys' share does in `attend`,
learned slower.

Shape suffixes: B sequences, H query heads, G KV heads, P query heads for each KV head, T tokens, S keys (as in
`linear_attention`), F features, D head dimension, N chunks, C tokens in a chunk, M = N + 1 states, R = C + 1 (before
each key of a chunk, and after the last).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slope_cli.linearize.gate import decays
from slope_cli.linearize.linear_attention import Attended, Branch, Maps, Pattern, window_softmax

CHUNK = 64
"""Longer chunks cost more in the solve than they save in states."""
FIRST_BETA = 0.05
FIRST_SHARE = 0.25
"""beta and lambda at first, for all keys and queries."""


class Share(nn.Module):
    """sigmoid(w·x / sqrt(D) + b) of queries or keys x, (B, H, S, D) -> (B, H, S), in their precision.

    first: what it is at first, for every x.
    """

    def __init__(self, heads: int, head_dim: int, first: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim))
        self.bias = nn.Parameter(torch.full((heads,), math.log(first / (1 - first))))

    def forward(self, x_BHSD: Tensor) -> Tensor:
        """The share of each."""
        w_HD1 = self.weight.to(x_BHSD.dtype)[..., None] * x_BHSD.shape[-1] ** -0.5
        z_BHS1: Tensor = x_BHSD @ w_HD1 + self.bias.to(x_BHSD.dtype)[:, None, None]
        return z_BHS1.squeeze(-1).sigmoid()


def attend_delta(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    keep_BS: Tensor | None,
    maps: Maps,
    pattern: Pattern,
    scale: float,
    *,
    state_BGFD: Tensor | None = None,
    branch: Branch = "both",
    dropped_BH: Tensor | None = None,
) -> Attended:
    """`attend` for a state of the delta rule, in a causal sliding window.

    The far keys of a query are those that left the window at its place or before: the rule of all places, given the
    keys and values as many places late.
    """
    assert maps.gate is not None
    assert maps.beta is not None
    assert maps.share is not None
    with torch.autocast(q_BHTD.device.type, enabled=False):
        dtype = torch.float64 if q_BHTD.dtype == torch.float64 else torch.float32
        q_BHTD, k_BGSD, v_BGSD = q_BHTD.to(dtype), k_BGSD.to(dtype), v_BGSD.to(dtype)
        T, D, S = q_BHTD.shape[2], q_BHTD.shape[3], k_BGSD.shape[2]
        keep_BS = k_BGSD.new_ones(len(k_BGSD), S, dtype=torch.bool) if keep_BS is None else keep_BS
        window_BHTD = window_softmax(q_BHTD, k_BGSD, v_BGSD, keep_BS, pattern, scale)
        if state_BGFD is None and pattern.window >= T:  # no key is far
            return Attended(window_BHTD, None)
        late = pattern.lookback - (S - T)
        k_BGTD, v_BGTD = (F.pad(x_BGSD, (0, 0, late, 0))[:, :, :T] for x_BGSD in (k_BGSD, v_BGSD))
        left_B1T, scaled_BHTD = F.pad(keep_BS, (late, 0))[:, None, :T], q_BHTD * (scale * D**0.5)
        beta_BGT, log_gates_BGT = maps.beta(k_BGTD) * left_B1T, maps.gate(k_BGTD) * left_B1T
        read_BHTD, state = delta_rule(maps.q(scaled_BHTD), maps.k(k_BGTD), v_BGTD, beta_BGT, log_gates_BGT, state_BGFD)
        dropped_BHT = None if dropped_BH is None else dropped_BH[..., None]
        y_BHTD = mixed(window_BHTD, read_BHTD, maps.share(scaled_BHTD), branch, dropped_BHT)
        return Attended(y_BHTD, None if state_BGFD is None else state)


def mixed(
    window_BHTD: Tensor, read_BHTD: Tensor, share_BHT: Tensor, branch: Branch, dropped_BHT: Tensor | None = None
) -> Tensor:
    """The window's output, and of what was read this share, (B, H, T); see `attend` for branch and dropped."""
    if branch == "window":
        return window_BHTD
    share_BHT = torch.ones_like(share_BHT) if branch == "linear" else share_BHT
    share_BHT = share_BHT if dropped_BHT is None else share_BHT.masked_fill(dropped_BHT, 1.0)
    any_far_BHT = (read_BHTD != 0).any(-1)  # what is read of an empty state is exactly 0
    return window_BHTD + (share_BHT * any_far_BHT)[..., None] * (read_BHTD - window_BHTD)


def delta_rule(
    q_BHTF: Tensor,
    k_BGTF: Tensor,
    v_BGTD: Tensor,
    beta_BGT: Tensor,
    log_gates_BGT: Tensor,
    state_BGFD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What T queries read of the state before the key of their own place, and the state after all T keys.

    Float tensors of one precision, in which all is computed; q and k of length 1. Time and memory are linear in T.

    Args:
        beta_BGT, log_gates_BGT: 0 for padding, which then leaves the state as it is.
        state_BGFD: before the first key; None for zeros.

    Returns:
        The reads (B, H, T, D), exactly 0 where nothing has been written yet, and the new state (B, G, F, D).
    """
    T, G, C = q_BHTF.shape[2], k_BGTF.shape[1], min(q_BHTF.shape[2], CHUNK)
    q_BGPNCF = _chunked(q_BHTF, C).unflatten(1, (G, -1))
    k_BGNCF, v_BGNCD = _chunked(k_BGTF, C), _chunked(v_BGTD, C)
    beta_BGNC1, log_gates_BGNC1 = _chunked(beta_BGT[..., None], C), _chunked(log_gates_BGT[..., None], C)

    before_RC = torch.ones(C + 1, C, dtype=torch.bool, device=q_BHTF.device).tril(-1)
    decays_BGNRR = decays(log_gates_BGNC1.mT, before_RC)  # from before a key, the column's, to before the row's
    from_first_BGNR1, from_keys_BGNRC = decays_BGNRR[..., :1], decays_BGNRR[..., 1:]
    to_end_BGNCF = from_keys_BGNRC[..., -1:, :].mT * k_BGNCF

    overlap_BGNCC = (beta_BGNC1 * from_keys_BGNRC[..., 1:, :] * (k_BGNCF @ k_BGNCF.mT)).tril(-1)
    right_BGNCX = beta_BGNC1 * torch.cat([v_BGNCD, from_first_BGNR1[..., 1:, :] * k_BGNCF], dim=-1)
    solved_BGNCX = torch.linalg.solve_triangular(overlap_BGNCC, right_BGNCX, upper=False, unitriangular=True)
    written_BGNCD, erased_BGNCF = solved_BGNCX.split([v_BGNCD.shape[-1], k_BGNCF.shape[-1]], dim=-1)  # u = w - e·S

    eye_FF = torch.eye(k_BGNCF.shape[-1], dtype=k_BGNCF.dtype, device=k_BGNCF.device)
    kept_BGNFF = from_first_BGNR1[..., -1:, :] * eye_FF - to_end_BGNCF.mT @ erased_BGNCF
    if state_BGFD is None:
        state_BGFD = v_BGTD.new_zeros(*k_BGTF.shape[:2], k_BGTF.shape[3], v_BGTD.shape[3])
    states_BGMFD: Tensor = _states(kept_BGNFF, to_end_BGNCF.mT @ written_BGNCD, state_BGFD)
    states_BGNFD = states_BGMFD[:, :, :-1]

    u_BGNCD = written_BGNCD - erased_BGNCF @ states_BGNFD
    weights_BGPNCC = ((q_BGPNCF @ k_BGNCF.mT[:, :, None]) * from_keys_BGNRC[:, :, None, :, :-1]).tril(-1)
    carried_BGPNCF = q_BGPNCF * from_first_BGNR1[:, :, None, :, :-1]
    reads_BGPNCD = weights_BGPNCC @ u_BGNCD[:, :, None] + carried_BGPNCF @ states_BGNFD[:, :, None]
    return reads_BGPNCD.flatten(1, 2).flatten(2, 3)[:, :, :T], states_BGMFD[:, :, -1]


def _chunked(x_BHTI: Tensor, chunk: int) -> Tensor:
    """(B, H, T, I) -> (B, H, N, C, I), zeros where the last chunk is not full."""
    chunked: Tensor = F.pad(x_BHTI, (0, 0, 0, -x_BHTI.shape[2] % chunk)).unflatten(2, (-1, chunk))
    return chunked


# An operator, because a compiler would unroll the loop: minutes for a long sequence, and anew for each length.
@torch.library.custom_op("slope::delta_states", mutates_args=())
def _states(kept_BGNFF: Tensor, added_BGNFD: Tensor, first_BGFD: Tensor) -> Tensor:
    """s_0 = first, s_n+1 = kept_n · s_n + added_n: (B, G, M, F, D)."""
    states = [first_BGFD.flatten(0, 1)]
    with torch.autocast(first_BGFD.device.type, enabled=False):
        for kept, added in zip(kept_BGNFF.flatten(0, 1).unbind(1), added_BGNFD.flatten(0, 1).unbind(1), strict=True):
            states.append(torch.baddbmm(added, kept, states[-1]))
    stacked: Tensor = torch.stack(states, dim=1).unflatten(0, first_BGFD.shape[:2])
    return stacked


@_states.register_fake
def _(kept_BGNFF: Tensor, added_BGNFD: Tensor, first_BGFD: Tensor) -> Tensor:
    B, G, N, F_, D = added_BGNFD.shape
    return first_BGFD.new_empty(B, G, N + 1, F_, D)


def _save_states(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _states_backward(ctx: Any, grad_BGMFD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same recurrence from the last state to the first: a state's whole gradient comes through those after it."""
    kept_BGNFF, states_BGMFD = ctx.saved_tensors
    grad_BGMFD = grad_BGMFD.flip(2)
    whole_BGMFD = _states(kept_BGNFF.flip(2).mT, grad_BGMFD[:, :, 1:], grad_BGMFD[:, :, 0]).flip(2)
    return whole_BGMFD[:, :, 1:] @ states_BGMFD[:, :, :-1].mT, whole_BGMFD[:, :, 1:], whole_BGMFD[:, :, 0]


_states.register_autograd(_states_backward, setup_context=_save_states)
