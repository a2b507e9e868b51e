"""Replay and general text beside any stage."""

from framework.stages.base import Term
from framework.stages.rehearsal import Rehearsal, Replay


class Loader:
    index = 0

    def next(self):
        self.index += 3
        stats = {
            "sequences": 3.0,
            "tokens": 9.0,
            "trained_tokens": 4.0,
            "trained_tokens/chat": 4.0,
            "epoch": 1.0,
        }
        return type("Step", (), {"micros": ["batch"], "stats": stats})()

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


class Stage:
    """One term a step, one held-out set, a number as state."""

    resting = False

    def __init__(self):
        self.at = 0

    def next(self, step):
        self.at += 1
        return [Term("own", ["micro"], stats={"tokens": 5.0})]

    def reports(self):
        return [("rollout", {"reward": 1.0})]

    def held_out(self):
        return {"task": Term("own", ["held"])}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_replay_is_a_second_term_with_its_own_scale_and_name():
    stage = Rehearsal(Stage(), replay=Replay(Loader(), "imitate", 0.25), retention={})
    own, replayed = stage.next(0)
    assert (own.objective, own.name, own.scale) == ("own", "", 1.0)
    assert (replayed.objective, replayed.name, replayed.scale) == ("imitate", "replay", 0.25)
    assert replayed.micros == ["batch"]
    assert replayed.stats == {
        "replay_sequences": 3.0,
        "replay_tokens": 9.0,
        "replay_trained_tokens": 4.0,
        "replay_trained_tokens/chat": 4.0,
    }


def test_both_positions_are_kept():
    stage = Rehearsal(Stage(), replay=Replay(Loader(), "imitate", 0.25), retention={})
    stage.next(0)
    stage.next(1)
    again = Rehearsal(Stage(), replay=Replay(Loader(), "imitate", 0.25), retention={})
    again.load_state_dict(stage.state_dict())
    assert (again.stage.at, again.replay.loader.index) == (2, 6)


def test_general_text_stands_beside_the_sets_of_the_stage():
    general = Term("nll", ["text"])
    stage = Rehearsal(Stage(), replay=None, retention={"general": general})
    assert list(stage.held_out()) == ["task", "general"]
    assert len(stage.next(0)) == 1
    assert stage.state_dict() == {"at": 1}
    assert (stage.resting, stage.reports()) == (False, [("rollout", {"reward": 1.0})])
