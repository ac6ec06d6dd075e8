"""``ConRLoss``: options that are read, set, checked, shown, copied and pickled."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conr_kernels import ConRLoss, MemoryBank, Variant, conr_loss
from conr_kernels.large_batch.ranks import GroupName
from tests.helpers.regimes import make_batch

OPTIONS = dict(
    window=3.0, temperature=0.05, push_scale=0.5, variant="released-age", distance="rmse",
    reduction="sum", backend="reference",
)  # fmt: skip


def rows() -> list[torch.Tensor]:
    batch = make_batch(40, L=2)
    return [batch[name] for name in ("features", "targets", "predictions")]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_attributes_have_types_for_editors_and_type_checkers():
    assert set(inspect.get_annotations(ConRLoss)) == {*OPTIONS, "group"}
    bank = MemoryBank(3, 2)
    types = inspect.get_annotations(MemoryBank, eval_str=True)
    own = {name for name in vars(bank) if name.startswith(("n_", "has_"))}
    assert set(types) == own | set(bank._buffers)
    assert all(isinstance(getattr(bank, name), kind) for name, kind in types.items())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_takes_effect_when_it_is_set(name):
    conr = ConRLoss()
    conr(*rows())
    setattr(conr, name, OPTIONS[name])
    assert getattr(conr, name) == OPTIONS[name] and f"{name}={OPTIONS[name]!r}" in repr(conr)
    assert torch.equal(conr(*rows()), conr_loss(*rows(), **{name: OPTIONS[name]}))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", 0.0, ValueError),
        ("temperature", torch.tensor(1.0), TypeError),
        ("window", -1, ValueError),
        ("push_scale", -0.1, ValueError),
        ("variant", "papers", ValueError),
        ("distance", "l2", ValueError),
        ("reduction", None, ValueError),
        ("backend", "fast", ValueError),
        ("group", "worlds", ValueError),
        ("group", True, TypeError),
        ("group", 3, TypeError),
    ],
)
def test_an_option_is_checked_when_it_is_set_and_then_kept(name, value, error):
    conr = ConRLoss()
    before = getattr(conr, name)
    with pytest.raises(error, match=name):
        setattr(conr, name, value)
    with pytest.raises(error, match=name):
        ConRLoss(**{name: value})
    assert getattr(conr, name) == before


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: AveragedModel(m).module,
    ],
    ids=["deepcopy", "copy", "pickle", "AveragedModel"],
)  # fmt: skip
@pytest.mark.parametrize("group", [None, "world", "WORLD", "new"])
def test_copies_and_pickles_keep_options_and_group(duplicate, group, one_rank):
    given = {"WORLD": dist.group.WORLD, "new": dist.new_group([0])}.get(group, group)
    model = nn.ModuleDict(dict(body=nn.Linear(7, 6), conr=ConRLoss(**OPTIONS, group=given)))
    copied = duplicate(model)["conr"]
    assert copied.options == model["conr"].options
    if group == "new":
        assert copied.group is given
    assert (copied.group is None) == (group is None)
    assert torch.equal(copied(*rows()), model["conr"](*rows()))


def test_a_pickled_group_that_is_not_there_is_named_at_the_call(one_rank):
    given = dist.new_group([0])
    pickled = pickle.dumps(ConRLoss(group=given))
    dist.destroy_process_group(given)
    with pytest.raises(RuntimeError, match=f"'{given.group_name}'.* set the loss's group"):
        pickle.loads(pickled)(*rows())


def test_what_stands_for_a_group_is_taken_and_shown():
    """A name out of a pickle, and what ``new_group`` returns to processes outside of the group."""
    for group in (GroupName("7"), dist.GroupMember.NON_GROUP_MEMBER, dist.ProcessGroup(0, 1)):
        conr = ConRLoss(group=group)
        conr.group = conr.group
        if not isinstance(group, dist.ProcessGroup):  # this one has no name yet
            assert f"group={group!r}" in repr(conr)
            copied = pickle.loads(pickle.dumps(conr))
            copied.group = copied.group


def test_world_before_init_process_group_is_never_a_local_loss():
    for call in (ConRLoss(group="world"), lambda *t: conr_loss(*t, group="world")):
        with pytest.raises(RuntimeError, match='"world".*init_process_group'):
            call(*rows())


def test_world_is_looked_up_at_each_call(tmp_path):
    conr = ConRLoss(group="world")
    for k in range(2):
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path / str(k)}", rank=0, world_size=1
        )
        torch.testing.assert_close(conr(*rows()), conr_loss(*rows()))
        dist.destroy_process_group()


def test_a_memory_bank_itself_serves_as_keys():
    x, y, p = rows()
    bank = MemoryBank(64, 7, 2)
    bank.push(x[20:], y[20:], p[20:])
    expected = conr_loss(x[:20], y[:20], p[:20], keys=(x[20:], y[20:], p[20:]))
    assert torch.equal(ConRLoss()(x[:20], y[:20], p[:20], keys=bank), expected)
    half = conr_loss(x[:20].half(), y[:20], p[:20], keys=bank)
    assert half.isfinite() and half > 0


@pytest.mark.parametrize(
    "name", ["temprature", "Temperature", "t", "pushscale", "windw", "dist", "groups", "backends"]
)
def test_a_name_that_is_nearly_an_options_is_refused(name):
    conr = ConRLoss()
    for value in (0.1, None, torch.ones(1), nn.Parameter(torch.ones(1)), nn.Linear(1, 1)):
        with pytest.raises(AttributeError, match=f"no option '{name}'; it has window, temperature"):
            setattr(conr, name, value)
    assert not hasattr(conr, name)


def test_a_module_takes_every_other_attribute():
    """What modules, tools and subclasses set goes on working."""
    conr = ConRLoss()
    conr.qconfig, conr.ds_id, conr._group, conr.log_every = None, 7, "mine", 5
    conr.tp_group, conr.distance_fn, conr.instance, conr.production = None, abs, 1, 2
    conr.extra, conr.learnt = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    conr.register_buffer("windows", torch.ones(3))
    conr.windows = torch.zeros(3)  # a buffer by then
    conr.register_forward_pre_hook(lambda *_: None)
    conr.forward = conr.forward
    assert conr.double().eval().train().training and conr.windows.dtype == torch.float64
    assert set(conr.state_dict()) == {"extra.weight", "extra.bias", "learnt", "windows"}
    del conr.forward
    for copied in (copy.deepcopy(conr), AveragedModel(conr).module):
        assert (copied.ds_id, copied._group, copied.log_every) == (7, "mine", 5)
        assert copied.options == conr.options and copied.windows.shape == (3,)


class Scheduled(ConRLoss):
    def __init__(self, temperatures, **options):
        super().__init__(**options)
        self.temperatures, self.weights_of_task = temperatures, {}


def test_a_subclass_has_attributes_of_any_name():
    conr = Scheduled([0.2, 0.1], window=2.0)
    conr.windows = [1.0, 2.0]
    conr = pickle.loads(pickle.dumps(conr))
    conr.temperature = conr.temperatures[1]
    assert conr.windows == [1.0, 2.0]
    assert torch.equal(conr(*rows()), conr_loss(*rows(), window=2.0, temperature=0.1))


def test_a_compiled_model_holds_the_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.conr = nn.Linear(7, 6), ConRLoss(window=3.0)

        def forward(self, x, y, p):
            return self.conr(self.body(x), y, p)

    model = Model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for temperature in (0.2, 0.3):
        model.conr.temperature = temperature
        torch.testing.assert_close(compiled(*rows()), model(*rows()))


def test_help_documents_every_argument():
    assert "conr_loss" in ConRLoss.forward.__doc__ != nn.Module.forward.__doc__
    text = ConRLoss.__doc__
    assert all(f"        {name}: " in text for name in (*OPTIONS, "group"))
    assert ConRLoss(variant=Variant(pushing="none")).variant == Variant(pushing="none")
