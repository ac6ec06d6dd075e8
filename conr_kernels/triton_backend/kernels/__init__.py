"""The Triton kernels: what runs on the device, and nothing that launches it.

A call's sorted rows: ``ordering`` puts them in order, ``layout`` finds their bands, ``sweeps`` or
``mirrored`` adds the sums up, ``gradient`` or, of wide features, ``tile_list`` and ``wide`` the
gradients. Few rows: ``dense`` and ``dense_gradient``. All of them: ``arithmetic``.
"""
