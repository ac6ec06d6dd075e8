"""The Triton kernels: what runs on the device, and nothing that launches it. Their legend; symbols
are those of conr_kernels/MATHEMATICS.md.

**A step's launches** [in brackets: not always]. Few rows (launch_dense.py): [``conr_gram_kernel``],
``conr_dense_sums_kernel``, ``conr_dense_rows_kernel``, [``conr_total_kernel``]; then
``conr_dense_gradient_kernel``, of a reduced loss in the forward pass and in the total's place, and
``conr_dense_finish_kernel``. Sorted rows:

- Order (launch_order.py): of vector labels ``conr_spread_kernel`` and ``conr_sort_keys_kernel``;
  ``conr_sort_kernel`` and some ``conr_merge_kernel``, or ``conr_rank_kernel`` behind PyTorch's
  sort; ``conr_order_kernel``: bands, choice of sweep, copies.
- Forward (launch_forward.py): ``conr_forward_kernel``; or, each pair once, ``conr_mirrored_kernel``
  and ``conr_mirrored_sums_kernel``; then ``conr_finish_kernel``, [``conr_total_kernel``]. Where
  there is no room for both orders' copies: the positives' and their sums, then the negatives'.
- Backward (launch_sweeps.py), with copies made anew unless forward's are kept:
  ``conr_backward_parts_kernel`` and ``conr_gradient_kernel``; or ``conr_backward_kernel`` twice,
  positives first; or, of wide features, ``conr_wide_list_kernel``, for each window of the list
  ``conr_wide_scores_kernel`` and ``conr_wide_product_kernel``, then ``conr_wide_gradient_kernel``.

**Pointers.** Anchors are i, N of them (``n_anchors``), keys j, K (``n_keys``); N' and K' are these
up to a multiple of 128. In the caller's order: ``x``, ``gradient`` [N, D], ``y``, ``p`` [N, L],
``w`` [N], ``key_x`` …; ``stats`` [N, 3 or 5] (core/rows.py), the gradient's ``coef``; ``poison``, 0
or NaN of each row; ``loss`` [N], or sums of some rows; ``sums``, ``n``, ``parts``: a row's sums, in
parts; ``G``: ``Σ_j H_ij q_j``, in parts, or [N, D] in ``gradient``'s memory (of 16-bit features its
upper halves there and the lower in ``G_rest``).

- ``layout``: head, orders, bands ``[lo, hi)``, ranks (layout.py). ``values``: sorted labels, then
  predictions; ``spread``, ``images``, ``sorted``: on their way there.
- Sorted copies (mirrored.py: ``q``, ``y``, ``p``), and the same of ``_j`` with K': ``q_i`` [N',
  D_PAD], unit features times ``√(log₂e/τ)``; ``y_i``, ``p_i`` [L, N']; ``inverse_i`` [N'],
  ``1/‖x_i‖``; ``coef_i`` [3 or 5, N']: α, β, γ or, with log₂|α| and log₂|γ| behind, signs for α and
  γ; times the upstream gradient, unless kept. Behind the last row features and coefficients are 0
  and labels NaN.
- ``list``, ``windows``, ``H``, ``H_scale``: tile_list.py, wide.py. ``kept``, ``radial``, ``gram``,
  ``out`` (the total): dense.py. Scalars: ``upstream``; ``n_absent``, keys that take no part.

**Numbers.** ``h``: the window, for sums over L components; ``reach``: along the sorted one.
``push_scale``: e. ``scale``: the copies' factor (dense: ``log₂e/τ``); ``unit``: of products of
copies in halves, to undo theirs. ``kappa``: from ``G`` to ``∂L/∂q_i``; ``factor``: of row losses.
``apart``, APART: 1 where the negatives' copies stand behind those pointed at, 0 where these are the
sweep's own. ``width``: D_PAD (dense: D), for loops that are not unrolled. ``n_slots``: programs
that share a tile of anchors; ``n_parts``: of sums or of G; ``n_tiles_j``, ``per_part``: tiles of
keys, of all and of a part; ``n_steps``: of a binary search; ``self_offset``: the anchors' place
among the keys; ``first``, ``window``, ``piece``: of the list.

**Constants.** Of the loss: L, RMSE, INSIDE, CONFUSED (negatives) and PHI, in the positives' sweep
False and "one"; SCALED, WEIGHTED: e and ``w_i`` are in ``r_i``; UNIT_TERMS, COUNT_SELF,
WEIGHTED_ROWS; REDUCED: sums of losses, not losses.

- SAME: the anchors are the keys; HAS_KEYS: they are not. SWEEPS of a launch; NEGATIVES: which one a
  function serves. EDGE: a tile across a band's border, whose pairs are compared. EXACT: L = 1, the
  bands are the sets. MIRRORED: each pair of tiles once. ORDERS: of copies at once.
- SHIFTED: exponents may be large: sums relative to their maximum, COLUMNS = 5 statistics. TINY:
  negatives' terms may underflow, so they are counted. RESCALE: ``H_ij`` by its row's scale, as
  float16 needs. KEPT: ``s_ij`` is stored. WIDE: labels in float64.
- PRECISION: ``tl.dot``'s, or "fp16x3": of float32 as two float16 (IN_HALVES: copies). UPCAST:
  products in float32, as Triton's interpreter multiplies 16-bit tiles wrongly. RESIDENT: anchors'
  features in registers. EARLY: a kernel may start before the last one's end, and waits for it
  (``await_earlier``); LATE: not in its first statement.
- D_PAD: D with its padding. BLOCK_I anchors × BLOCK_J keys × BLOCK_D columns of a tile; BLOCK_K:
  keys of a product's step; BLOCK, ROWS, CHUNK: of others.
"""
