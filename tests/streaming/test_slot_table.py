"""Tests SlotTable against a simple model that keeps full histories and sums them each time."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashmoe.streaming.slot_table import SlotTable

NUM_EXPERTS = 9
NUM_SLOTS = 4


class Model:
    """The behaviour of SlotTable, without its optimisations."""

    def __init__(self, half_life):
        self.half_life = half_life
        self.clock = 0
        self.uses = {}  # expert -> [(clock, count)]
        self.last_use = {}
        self.calls = 0
        self.slot_of = {}

    def record_use(self, counts, tokens):
        self.clock += tokens
        self.calls += 1
        for expert, count in counts.items():
            self.uses.setdefault(expert, []).append((self.clock, count))
            self.last_use[expert] = self.calls

    def score(self, expert):
        total = 0.0
        # Not by sum(): from Python 3.12 on it keeps the bits that an addition rounds away.
        for time, count in self.uses.get(expert, ()):
            total += count * 0.5 ** ((self.clock - time) / self.half_life)
        return total

    def victim(self, pinned):
        candidates = self.slot_of.keys() - pinned
        return min(
            candidates, key=lambda e: (self.score(e), self.last_use.get(e, 0), e), default=None
        )


def test_resize_drops_free_slots_and_then_the_lowest_scores():
    slots = SlotTable(4, 9, half_life=1.0)
    for expert, uses in [(5, 3), (6, 1), (7, 2)]:
        slots.record_use({expert: uses}, 0)
        slots.allocate(expert, ())
    before = slots.residents
    assert slots.resize(3, ()) == [3], "the free slot goes first"
    assert slots.residents == before
    assert slots.resize(2, {6}) == [before[7]], "the lowest score that is not pinned"
    assert slots.lookup(7) is None
    assert slots.resize(1, {5, 6}) == []
    assert slots.num_slots == 2, "all experts are pinned"
    assert slots.resize(1, ()) == [before[6]]
    assert slots.allocate(8, {5}) is None
    assert slots.resize(4, ()) == []
    assert {slots.allocate(e, {5}) for e in (6, 7, 8)} == {0, 1, 2, 3} - {before[5]}
    assert slots.allocate(4, ()) == before[6], "6 and 8 have the lowest score, 6 is older"
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"num_slots is {wrong}, must be 1..4"):
            slots.resize(wrong, ())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, NUM_EXPERTS - 1)), max_size=40))
def test_each_expert_gets_its_own_slot_when_all_fit(steps):
    """Experts are allocated and dropped in any order; with all of them it is fully resident."""
    slots = SlotTable(NUM_EXPERTS, NUM_EXPERTS)
    for drop, expert in [*steps, *((False, e) for e in range(NUM_EXPERTS))]:
        if (slots.lookup(expert) is not None) == drop:
            slots.drop(expert) if drop else slots.allocate(expert, ())
        assert all(e == slot for e, slot in slots.residents.items())
        assert slots.is_identity == (len(slots) == NUM_EXPERTS)
    assert slots.is_identity


def test_table_with_an_expert_in_another_slot_is_not_fully_resident():
    """Experts are in other slots after a time with fewer slots."""
    slots = SlotTable(4, 4)
    slots.resize(3, ())
    for expert in (3, 1, 0):
        slots.allocate(expert, ())
    slots.resize(4, ())
    slots.allocate(2, ())
    assert len(slots) == 4
    assert slots.residents != {e: e for e in range(4)}
    assert not slots.is_identity


experts = st.integers(0, NUM_EXPERTS - 1)
counts = st.dictionaries(experts, st.integers(0, 3), max_size=5)


class SlotTableMachine(RuleBasedStateMachine):
    """Compares SlotTable with the model after each step.

    A half-life of one token keeps both sums exact, so that both have the same ties.
    """

    def __init__(self):
        super().__init__()
        self.slots = SlotTable(NUM_SLOTS, NUM_EXPERTS, half_life=1.0)
        self.model = Model(half_life=1.0)
        self.evictions = 0

    @rule(counts=counts, tokens=st.sampled_from([0, 1, 1, 2, 18]))
    def record_use(self, counts, tokens):
        self.slots.record_use(counts, tokens)
        self.model.record_use(counts, tokens)

    @rule(expert=experts, pinned=st.sets(experts))
    def allocate(self, expert, pinned):
        held = self.model.slot_of
        if expert in held:
            with pytest.raises(ValueError, match=f"expert {expert} is already in slot"):
                self.slots.allocate(expert, pinned)
            return
        full = len(held) == NUM_SLOTS
        victim = self.model.victim(pinned) if full else None
        slot = self.slots.allocate(expert, pinned)
        if full and victim is None:
            assert slot is None
            return
        if victim is not None:
            assert slot == held.pop(victim)
            self.evictions += 1
        assert slot not in held.values()
        held[expert] = slot

    @precondition(lambda self: self.model.slot_of)
    @rule(data=st.data())
    def drop(self, data):
        expert = data.draw(st.sampled_from(sorted(self.model.slot_of)))
        self.slots.drop(expert)
        del self.model.slot_of[expert]

    @invariant()
    def table_is_the_model_table(self):
        held = self.model.slot_of
        assert self.slots.residents == held
        assert [self.slots.lookup(e) for e in range(NUM_EXPERTS)] == [
            held.get(e) for e in range(NUM_EXPERTS)
        ]
        assert sorted({*held.values()}) == sorted(held.values())
        assert all(0 <= slot < NUM_SLOTS for slot in held.values())
        assert len(self.slots) == len(held) == NUM_SLOTS - self.slots.free
        assert self.slots.evictions == self.evictions

    @invariant()
    def scores_are_the_model_scores(self):
        for expert in range(NUM_EXPERTS):
            assert self.slots.score(expert) == self.model.score(expert)


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=150, stateful_step_count=50)


@given(
    half_life=st.floats(0.7, 1000),
    uses=st.lists(st.tuples(counts, st.integers(0, 700)), max_size=30),
)
def test_scores_equal_the_sum_over_the_history(half_life, uses):
    slots, model = SlotTable(1, NUM_EXPERTS, half_life), Model(half_life)
    for call in uses:
        slots.record_use(*call)
        model.record_use(*call)
    for expert in range(NUM_EXPERTS):
        # Scores below 1e-100 no longer matter, and may have underflowed.
        assert slots.score(expert) == pytest.approx(model.score(expert), rel=1e-9, abs=1e-100)


def test_renormalising_does_not_change_the_victim():
    rng = random.Random(0)
    slots, model = SlotTable(16, 40, half_life=1.0), Model(1.0)
    renormalised = 0
    for _ in range(900):
        call = {rng.randrange(40): rng.randint(1, 3) for _ in range(3)}
        before = slots._exponent
        slots.record_use(call, 1)
        renormalised += slots._exponent < before
        model.record_use(call, 1)
        for expert in call:
            if expert not in model.slot_of:
                if len(model.slot_of) == 16:
                    del model.slot_of[model.victim(set(call))]
                model.slot_of[expert] = slots.allocate(expert, set(call))
        assert slots.residents == model.slot_of
    assert renormalised == 1


def test_very_long_pause_does_not_overflow():
    slots = SlotTable(2, 5, half_life=0.5)
    slots.record_use({0: 10**6, 1: 1}, 1)
    slots.allocate(0, ())
    slots.record_use({1: 1}, 10**12)
    slots.allocate(1, ())
    assert slots.score(0) == 0.0
    assert slots.score(1) == 1.0
    assert slots.allocate(2, ()) == 0


def test_ties_are_broken_by_recency_and_then_by_id():
    slots = SlotTable(3, 6, half_life=1.0)
    slots.record_use({5: 2}, 1)  # one token later it counts 1, like the others then
    slots.record_use({4: 1, 3: 1}, 1)
    for expert in (4, 5, 3):
        slots.allocate(expert, ())
    left = []
    for expert in (0, 1, 2):
        before = slots.residents
        slots.allocate(expert, {0, 1, 2})
        left += before.keys() - slots.residents
    assert left == [5, 3, 4]


def test_renormalising_keeps_fractions_of_a_half_life():
    slots = SlotTable(1, 2, half_life=0.7)
    slots.record_use({0: 1}, 358)  # the weight of a use is now 2**511.4
    slots.record_use({1: 1}, 1)
    assert slots.score(0) == pytest.approx(0.5 ** (1 / 0.7))
    assert slots.score(1) == pytest.approx(1.0)


def test_evicted_expert_keeps_its_history():
    slots = SlotTable(1, 3, half_life=100.0)
    slots.record_use({0: 5}, 1)
    slots.allocate(0, ())
    slots.allocate(1, ())
    assert slots.score(0) == pytest.approx(5.0)


def test_pinned_experts_that_are_not_resident_block_no_slot():
    slots = SlotTable(2, 6)
    slots.allocate(0, ())
    slots.allocate(1, ())
    assert slots.allocate(2, {3, 4, 5, 1}) == 0
    assert slots.allocate(3, {1, 2}) is None
    assert slots.residents == {1: 1, 2: 0}


@pytest.mark.parametrize("expert", [-1, 7, 10**6])
@pytest.mark.parametrize(
    "call",
    [
        lambda slots, e: slots.lookup(e),
        lambda slots, e: slots.score(e),
        lambda slots, e: slots.allocate(e, ()),
        lambda slots, e: slots.drop(e),
        lambda slots, e: slots.record_use({0: 1, e: 1}, 1),
    ],
    ids=["lookup", "score", "allocate", "drop", "record_use"],
)
def test_expert_out_of_range_is_refused(call, expert):
    slots = SlotTable(3, 7)
    with pytest.raises(ValueError, match=f"expert {expert} is out of range: the layer has 7"):
        call(slots, expert)
    assert slots.score(0) == 0.0  # a refused use counts nothing
    assert len(slots) == 0


def test_dropping_an_absent_expert_is_refused():
    slots = SlotTable(2, 7)
    slots.allocate(5, ())
    with pytest.raises(ValueError, match="expert 4 is not resident"):
        slots.drop(4)
    assert slots.free == 1


@pytest.mark.parametrize(
    ("counts", "tokens", "text"),
    [({1: 1}, -1, "tokens is -1"), ({0: 1, 1: -2}, 1, "expert 1 has count -2")],
)
def test_negative_use_is_refused(counts, tokens, text):
    slots = SlotTable(2, 3)
    with pytest.raises(ValueError, match=text):
        slots.record_use(counts, tokens)
    assert slots.score(0) == 0.0


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((0, 5), "num_slots is 0, must be 1..5"),
        ((6, 5), "num_slots is 6, must be 1..5"),
        ((2, 5, 0.0), "half_life is 0.0"),
        ((2, 5, float("inf")), "half_life is inf"),
        ((2, 5, float("nan")), "half_life is nan"),
    ],
)
def test_invalid_table_is_refused(args, text):
    with pytest.raises(ValueError, match=text):
        SlotTable(*args)
