"""Generators of keys."""

from library.core import keyed_random
from library.core.keyed_random import LateRandom


def test_a_late_generator_draws_what_the_same_key_draws_and_is_seeded_once_and_only_for_a_draw(monkeypatch):
    made = []
    seeded = keyed_random.keyed_random
    monkeypatch.setattr(keyed_random, "keyed_random", lambda *key: made.append(key) or seeded(*key))
    late, now = LateRandom(5, "caption", 3, 1), seeded(5, "caption", 3, 1)
    assert made == []
    assert [late.random(), late.choice("abcd"), late.random(), late.randrange(9)] == [
        now.random(), now.choice("abcd"), now.random(), now.randrange(9)
    ]  # fmt: skip
    assert len(made) == 1
