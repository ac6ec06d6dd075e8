"""``conr_loss`` and ``ConRLoss``: the contract; batch.py and large_batch/union.py do the work."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from . import notices, validation
from .batch import Options, loss, prepare, try_prepare
from .large_batch.memory_bank import MemoryBank
from .large_batch.ranks import check_group, find_group, group_name
from .large_batch.union import union_loss
from .variants import Variant


def conr_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None = None,
    *,
    window: float = 1.0,
    temperature: float = 0.2,
    push_scale: float = 0.01,
    variant: str | Variant = "paper",
    distance: str = "mae",
    reduction: str = "mean",
    backend: str = "auto",
    keys: tuple[Tensor, ...] | MemoryBank | None = None,
    group: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""ConR: contrastive regularization for deep imbalanced regression (Keramati, Meng, Evans,
    ICLR 2024).

    With unit features ``q_i = x_i/‖x_i‖``, similarities ``s_ij = q_i·q_j/τ``, label distance
    ``d_ij``, prediction distance ``δ_ij``, positives ``P_i = {j ≠ i: d_ij ≤ h}`` (``n_i`` of
    them), negatives ``M_i = {j: d_ij > h, δ_ij ≤ h}`` and pushing weights ``S_ij = e·w_i·d_ij``
    (Eq. 1–3 and A.4)::

        Z_i = Σ_{j∈P_i} exp(s_ij) + Σ_{j∈M_i} S_ij exp(s_ij)
        ℓ_i = −log( (1/n_i) Σ_{j∈P_i} exp(s_ij) / Z_i )   if P_i and M_i have members, else 0
        L   = (1/N) Σ_i ℓ_i

    The total objective of the paper is ``α·regression + β·L`` (Eq. 4). Pairs exist only inside the
    window ``h``, so the fused backends visit two narrow bands of the N×N pairs, exactly, in O(N·D)
    memory.

    Args:
        features: ``x`` [N, D], float16, bfloat16, float32 or float64, any strides.
        targets: labels ``y`` [N], [N, 1] or [N, L], real; in the units of ``window``.
        predictions: ``p``, like targets. Used for the masks only.
        weights: density weights ``w ≥ 0`` [N], [N, 1], a scalar, or None for 1 (see
            ``density_weights``). A Tensor is not searched for negative values, which make the loss
            undefined.
        window: ``h ≥ 0``, the label distance up to which two rows are similar (``1/ω`` of the
            paper). A value beyond float32's range counts as infinite.
        temperature: ``τ > 0``, such that ``1/τ`` is finite in float32.
        push_scale: ``e``, the constant of ``η_j = e·w_j``; ≥ 0 unless pushing is exponential.
        variant: a preset name (``"paper"``, ``"released-age"``, ``"released-depth"``,
            ``"no-pushing"``, ``"no-weight"``, ``"no-similarity"``, ``"contrastive"``) or a
            ``Variant``.
        distance: over the L components: ``"mae"`` mean absolute, ``"rmse"`` root mean square
            difference.
        reduction: ``"mean"`` over the N rows, ``"sum"``, or ``"none"``: the row losses [N].
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.
        keys: ``(features, targets, predictions[, mask])`` of further rows, or a ``MemoryBank``:
            positives and negatives of the batch's rows, no anchors, no gradient.
        group: a ``torch.distributed`` process group, or ``"world"`` for the default one: the batch
            is the union of all ranks' rows (any number on each, even none) and, with ``keys``, of
            all ranks' keys. ``"mean"`` and ``"sum"`` give the union's value on every rank,
            ``"none"`` this rank's rows. The gradient is the union's, for this rank's features,
            times the number of ranks: ``DistributedDataParallel`` divides by that number, so W
            processes train as one with the union batch, beside a locally averaged regression loss.
            Every rank of the group must make the call and the backward pass. Not traced by
            ``torch.compile``.
        mask: bool [N] or [N, 1], True for the rows that take part (missing labels, invalid pixels).
            The others are no anchors and nobody's keys, and may hold anything, NaN included; their
            row loss and gradient are 0. ``"mean"`` divides by the number of rows that take part.
            The value is that of the batch filtered by the mask, but the host does not wait for the
            mask and no shape depends on it.

    Returns:
        The loss: float32, float64 for float64 features, also under autocast. It is 0, with a
        gradient of 0, where no row is an anchor: N = 0, no row with both a positive and a negative,
        no row that takes part. Differentiable once, in ``features`` alone (any number of times with
        ``backend="reference"``): targets, predictions and weights act through sets and factors and
        get no gradient, even if they require one. Label distances are compared in float32, exact
        for integers up to 2²⁴ (float64 labels on the CPU: in float64).

    Raises:
        TypeError, ValueError: bad input; the message names the argument, what was expected and
            what was got. With a ``group`` all ranks raise where one has bad input, and ValueError
            where they disagree (D, L, dtypes, options, ``requires_grad``).
        RuntimeError: an explicit backend that cannot run here; a ``group`` before
            ``init_process_group``; ``vmap``, forward-mode or second derivatives of a backend other
            than ``"reference"``.

    Warns:
        UserWarning: at most once per process each: for the first batch on the CPU in which no row
            is an anchor, and for a loss without ``group`` in one of several processes.
    """
    options = Options(window, temperature, push_scale, variant, distance, reduction, backend)
    return _loss(features, targets, predictions, weights, keys, mask, options, group)


def _loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | float | None,
    keys: tuple[Tensor, ...] | MemoryBank | None,
    mask: Tensor | None,
    options: Options,
    group: Any,
) -> Tensor:
    if group is None:
        notices.look_for_ranks()
        batch = prepare(features, targets, predictions, weights, keys, mask, options)
        value = loss(batch)
        notices.look_for_anchors(batch, value)
        return value
    check_group(group)
    prepared = try_prepare(features, targets, predictions, weights, keys, mask, options)
    if torch.compiler.is_compiling():
        from .large_batch import tracing

        return tracing.union_loss(group, prepared)
    return union_loss(group, prepared)


class ConRLoss(nn.Module):
    """``conr_loss`` as a module: every option is an attribute, which can be read and set at any
    time and is checked when it is set.

    A temperature schedule sets ``conr.temperature = 0.1``. The module has no parameters or buffers.
    Copies, pickles and averaged models keep the options, and a process group by its name. Other
    attributes can be set as on any module, except under a name that resembles an option's
    (``conr.temprature``), which would have no effect; subclasses may set any.

    Args:
        window: ``h ≥ 0``, the label distance up to which two rows are similar.
        temperature: ``τ > 0``.
        push_scale: ``e``, the constant of the pushing weight.
        variant: a preset's name or a ``Variant``.
        distance: over the labels' components, ``"mae"`` or ``"rmse"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"reference"``.
        group: a ``torch.distributed`` process group, whose ranks' rows are one batch; ``"world"``
            for the default group, looked up at each call (the module may be built before
            ``init_process_group``); None for this process's rows alone.

    Raises:
        TypeError, ValueError: an option that ``conr_loss`` would refuse.
        AttributeError: setting a name that resembles an option's.
    """

    window: float
    temperature: float
    push_scale: float
    variant: str | Variant
    distance: str
    reduction: str
    backend: str
    group: Any

    def __init__(
        self,
        *,
        window: float = 1.0,
        temperature: float = 0.2,
        push_scale: float = 0.01,
        variant: str | Variant = "paper",
        distance: str = "mae",
        reduction: str = "mean",
        backend: str = "auto",
        group: Any = None,
    ) -> None:
        super().__init__()
        options = Options(window, temperature, push_scale, variant, distance, reduction, backend)
        options.check()
        check_group(group)
        # Separate attributes: torch.compile guards each by itself.
        self.__dict__.update({n: _plain(t) for n, t in options._asdict().items()}, group=group)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Options._fields:
            self.options._replace(**{name: value}).check()
            value = _plain(value)
        elif name == "group":
            check_group(value)
        elif type(self) is ConRLoss and not hasattr(self, name):
            _check_spelling(name)
        super().__setattr__(name, value)

    @property
    def options(self) -> Options:
        return Options(
            self.window, self.temperature, self.push_scale, self.variant, self.distance,
            self.reduction, self.backend,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        targets: Tensor,
        predictions: Tensor,
        weights: Tensor | float | None = None,
        keys: tuple[Tensor, ...] | MemoryBank | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``conr_loss`` with this module's options.

        Args:
            features, targets, predictions, weights, keys, mask: as ``conr_loss`` documents them.

        Returns:
            The loss, as ``conr_loss`` documents it; so are errors and warnings.
        """
        return _loss(features, targets, predictions, weights, keys, mask, self.options, self.group)

    def extra_repr(self) -> str:
        options = self.options._asdict() | {"group": group_name(self.group)}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": group_name(self.group)}  # a group cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "group": find_group(state["group"])})


def _check_spelling(name: str) -> None:
    """Refuses a misspelt or shortened option's name, which would have no effect.

    All other names pass, compounds such as ``tp_group`` too: tools set attributes of their own on
    every module of a model.
    """
    options = (*Options._fields, "group")
    first, *_, last = name.split("_") * 2
    is_compound = first != last and not {first, last}.isdisjoint(options)
    near = difflib.get_close_matches(name.lower(), options, cutoff=0.75)
    begins_one = any(option.startswith(name) for option in options)
    is_near = begins_one or any(option[0] == name[0].lower() for option in near)
    if is_near and not is_compound:
        raise AttributeError(f"ConRLoss has no option {name!r}; it has {', '.join(options)}")


def _plain(option: Any) -> Any:
    """Numbers as Python numbers: torch.compile treats numpy's scalars as arrays."""
    is_other = validation.is_number(option) and type(option) not in (int, float)
    return float(option) if is_other else option
