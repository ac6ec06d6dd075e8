"""Batches beyond the encoder's memory: the gradient of a loss over all rows, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .. import notices, validation


def gradient_cache(
    encoder: Encoder,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    chunk_size: int,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    r"""One step's gradients of a loss over all rows, with an encoder that sees ``chunk_size`` rows
    at a time.

    Encodes in chunks without a graph, differentiates the loss over all N rows with respect to
    features and predictions, then encodes each chunk again with a graph and backpropagates its
    rows' gradient (Gao, Zhang, Han, Callan: *Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup*, 2021). Gradients are accumulated in ``.grad`` and equal those of
    ``loss(*encoder(inputs)).backward()`` to rounding, for the memory of one chunk's activations
    and one more forward pass. ::

        def loss(features, predictions):
            regression = mse_loss(predictions, targets)
            return regression + beta * conr(features, targets, predictions, weights)

        value = gradient_cache(model, images, loss, chunk_size=256)
        optimizer.step()

    The second encoding sees the first one's random numbers (dropout) and buffers, so that running
    statistics count each row once; if the encoder raises, its buffers are restored, so that the
    step can be retried in smaller chunks. Batch normalisation normalises within a chunk. Call it
    inside ``torch.autocast`` for mixed precision. A ``DistributedDataParallel`` encoder reduces its
    gradients once, with the last chunk; give the ConR loss ``group=`` there and the regression
    loss the local mean. Pass a module, not a function around one: only a module shows its buffers,
    devices and DDP. A function counts running statistics twice, and hangs around DDP where ranks
    have different numbers of chunks (as ``SyncBatchNorm`` does in any case).

    Args:
        encoder: maps a chunk of the inputs to features [n, D] and predictions [n] or [n, L].
        inputs: data [N, …] without a graph: a Tensor, a sequence (``encoder(*chunk)``) or a mapping
            (``encoder(**chunk)``) of Tensors.
        loss: maps features [N, D] and predictions of all rows to a scalar.
        chunk_size: the most rows encoded at a time; all chunks are equally long, or one row
            shorter.
        scaler: scales the gradients, as in ``scaler.scale(loss).backward()``.

    Returns:
        The loss, detached and unscaled.

    Raises:
        TypeError, ValueError: bad input or outputs.
        RuntimeError: gradients are disabled; a buffer of a lazy module has no shape yet; or the
            second encoding of a chunk differs from the first by more than rounding, so that the
            gradients would be those of another loss. Rounding is 4 epsilons for a chunk and 8 for a
            row, of the coarsest dtype among features, parameters and autocast, on GPUs at least
            bfloat16's.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradient_cache computes gradients: call it outside of torch.no_grad and inference_mode"
        )
    notices.look_for_synchronisation(encoder)
    validation.check_counts(chunk_size=chunk_size)
    is_named, named = isinstance(inputs, Mapping), _named(inputs)
    N = validation.check_inputs(named)
    # Equally long: batch normalisation would normalise a short last chunk by its few rows.
    n_chunks = max(-(-N // chunk_size), 1)
    chunks = list(zip(*(t.tensor_split(n_chunks) for t in named.values()), strict=True))

    def encode(chunk: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        outputs = encoder(**dict(zip(named, chunk, strict=True))) if is_named else encoder(*chunk)
        validation.check_outputs(outputs)
        return outputs

    state = encoder if isinstance(encoder, nn.Module) else nn.Module()
    _share_buffers(state)
    devices = {t.device for t in (*named.values(), *state.parameters(), *state.buffers())}
    buffers = _hold_buffers(state)
    random_states, encoded = [], []
    try:
        with torch.no_grad():
            for chunk in chunks:
                random_states.append(_random_state(devices))
                encoded.append(encode(chunk))
    finally:
        _restore_buffers(buffers)
    features, predictions = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    del encoded
    validation.check_encoded(features, predictions, N)
    # Weights that autocast has cast without a graph must not serve the second encoding.
    torch.clear_autocast_cache()

    for t in (features, predictions):
        t.requires_grad_(t.is_floating_point())
    with torch.enable_grad():
        value = loss(features, predictions)
    validation.check_value(value)
    _backward([value if scaler is None else scaler.scale(value)], [None])
    end_state, epsilon = _random_state(devices), _epsilon((features, *state.parameters()))
    further = _take_further_buffers(buffers)
    try:
        for k, chunk in enumerate(chunks):
            _set_random_state(random_states[k])
            # Gradients accumulate on each rank and are reduced with the last chunk.
            waits = hasattr(encoder, "no_sync") and k < n_chunks - 1
            with encoder.no_sync() if waits else nullcontext(), torch.enable_grad():
                outputs, gradients = [], []
                for output, whole in zip(encode(chunk), (features, predictions), strict=True):
                    if whole.grad is not None and output.requires_grad:
                        _check_repeats(output, whole.tensor_split(n_chunks)[k], epsilon)
                        outputs.append(output)
                        gradients.append(whole.grad.tensor_split(n_chunks)[k])
                _backward(outputs, gradients)
    except BaseException:
        _restore_buffers(buffers)
        for module, name, t in further:  # the encoder may have noted that it has registered them
            module._buffers.setdefault(name, t)
        raise
    finally:
        _set_random_state(end_state)
    return value.detach()


Encoder = Callable[..., tuple[Tensor, Tensor]]
RandomState = dict[torch.device, Tensor]


def _named(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    return {f"inputs[{i}]": t for i, t in enumerate(inputs)}


def _share_buffers(encoder: nn.Module) -> None:
    """Broadcasts rank 0's buffers, as DDP does before a forward pass: before they are held."""
    for module in encoder.modules():
        if isinstance(module, DistributedDataParallel) and module.will_sync_module_buffers():
            module._sync_buffers()
            module.require_forward_param_sync = False


class Held(NamedTuple):
    """A buffer, its copy, and its version, which tells writes where values are not compared."""

    t: Tensor | None
    copy: Tensor | None
    version: int


Buffers = list[tuple[nn.Module, dict[str, Held]]]


def _hold_buffers(encoder: nn.Module) -> Buffers:
    for name, t in encoder.named_buffers():
        if is_lazy(t):
            raise RuntimeError(
                f"gradient_cache: the encoder's buffer {name} has no shape yet, so that it cannot "
                "be kept for the second encoding: encode a few rows once beforehand"
            )
    return [
        (module, {name: _hold(t) for name, t in module._buffers.items()})
        for module in encoder.modules()
    ]


def _hold(t: Tensor | None) -> Held:
    if t is None:
        return Held(None, None, 0)
    return Held(t, t.clone(), -1 if t.is_inference() else t._version)


def _restore_buffers(buffers: Buffers) -> None:
    """Restores tensors that the encoder has replaced, and values that it has written. Others are
    not touched: an earlier graph may need them, or they may be read-only.
    """
    written: dict[torch.device, list[tuple[Held, Tensor]]] = {}
    for module, held in buffers:
        for name, of_name in held.items():
            module._buffers[name] = of_name.t
            if of_name.t is not None and not of_name.t.is_meta:
                of_device = written.setdefault(of_name.t.device, [])
                of_device.append((of_name, _is_written(of_name)))
    for of_device in written.values():  # one synchronisation each
        answers = torch.stack([is_written for _, is_written in of_device]).tolist()
        for (of_name, _), is_written in zip(of_device, answers, strict=True):
            if is_written:
                with torch.inference_mode() if of_name.t.is_inference() else torch.no_grad():
                    of_name.t.copy_(of_name.copy)


def _is_written(held: Held) -> Tensor:
    """Compares values, since writes through ``.data`` leave the version alone; NaN equals NaN."""
    t, copy, version = held
    if t.layout == torch.strided and not t.is_nested:
        return ((t != copy) & ~(t.isnan() & copy.isnan())).any()
    return torch.tensor(t.is_inference() or t._version != version, device=t.device)


def _take_further_buffers(buffers: Buffers) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Removes and returns the buffers that the first encoding has registered."""
    return [
        (module, name, module._buffers.pop(name))
        for module, held in buffers
        for name in module._buffers.keys() - held.keys()
    ]


def _epsilon(tensors: Iterable[Tensor]) -> float:
    """The largest epsilon of the dtypes of these and of autocast; on GPUs at least bfloat16's, in
    which an encoder may compute what it returns in float32.
    """
    found = [0.0]
    for t in tensors:
        if t.is_floating_point():
            on = t.device.type
            of_autocast = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else t.dtype
            found += [torch.finfo(dtype).eps for dtype in (t.dtype, of_autocast)]
            found += [2**-7] * (on != "cpu")
    return max(found)


def _check_repeats(second: Tensor, first: Tensor, epsilon: float) -> None:
    """Raises where two encodings of a chunk differ by more than rounding: by a state or a random
    number.

    Most encodings repeat every bit. Where other kernels serve without a graph than with one
    (transformers in eval mode, LSTMs, compiled 16-bit networks) a row of 16-bit features differed
    by up to 1.8 times the dtype's epsilon, a single number, which may cancel in all rows, by 5.8.
    """
    first, second = (t.detach().float()[:, None].flatten(1) for t in (first, second))
    tolerance = max(4 * epsilon if first.shape[1] > 1 else epsilon**0.5, 2**-12)
    rows, difference = first.norm(dim=1), (second - first).norm(dim=1)
    scale = rows.clamp(min=rows.square().mean().sqrt())  # a row that is nearly 0 cancels
    is_off = difference.norm() > tolerance * rows.norm()
    # Comparisons are False where a number is not finite.
    if is_off | (difference > 2 * tolerance * scale).any():
        raise RuntimeError(
            "gradient_cache: the encoder's second encoding of a chunk differs from its first, so "
            "that the gradients would be wrong. Likely causes: random numbers that do not come "
            "from PyTorch's default generators (numpy, random, a Generator of its own), or state "
            "that is not a buffer of the module (an attribute, a counter, a cache). Draw them once "
            "per step outside the encoder, or register the state as a buffer. If the encoder "
            "computes in 16 bits and returns float32, it may be rounding: call gradient_cache "
            "inside torch.autocast"
        )


def _backward(outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Backpropagates outside autocast, as PyTorch advises."""
    if not outputs:
        return
    with torch.autocast(outputs[0].device.type, enabled=False):
        torch.autograd.backward(outputs, gradients)


def _random_state(devices: set[torch.device]) -> RandomState:
    accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
    states = {d: torch.get_device_module(d).get_rng_state(d) for d in accelerators}
    return states | {torch.device("cpu"): torch.get_rng_state()}


def _set_random_state(states: RandomState) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
