"""Three ranks agree before training, in threads: the store is real, the processes need not be."""

import socket
import threading
import time

import pytest

from framework.cluster.environ import Place
from framework.cluster.meeting import Meeting
from framework.cluster.worker import RefusedElsewhere
from framework.errors import ConfigError, SapwoodError


def ranks(play, size=3):
    """What `play(meeting, rank)` returned or raised, by rank; rank 0 hosts the store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = {}

    def one(rank):
        place = Place(rank, size, rank, size, 0, "environment", "127.0.0.1", port)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        meeting = Meeting(place, environment, arrival_s=20)
        assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "True"  # the process group hosts no other
        try:
            answers[rank] = play(meeting, rank)
        except SapwoodError as error:
            answers[rank] = error
        del meeting._store  # as when the process ends

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [answers.get(rank) for rank in range(size)]


def test_rank_0_answers_for_all():
    def play(meeting, rank):
        first = meeting.first(lambda: {"asked": rank})
        meeting.each(lambda: None)
        return first, meeting.first(lambda: [rank, "again"])

    assert ranks(play) == [({"asked": 0}, [0, "again"])] * 3


def test_what_rank_0_refuses_reaches_ranks_that_come_late():
    """Rank 0 holds the store, so it may not leave before the others have heard."""

    def refuse():
        raise ConfigError("no such key")

    def play(meeting, rank):
        time.sleep(0.3 * rank)
        meeting.first(refuse)

    answers = ranks(play)
    assert [type(answer) for answer in answers] == [ConfigError, RefusedElsewhere, RefusedElsewhere]


def test_what_goes_wrong_on_one_rank_goes_wrong_on_all():
    def play(meeting, rank):
        meeting.each(lambda: 1 / 0 if rank == 1 else None)

    with pytest.raises(ZeroDivisionError):
        alone(play)
    answers = ranks(lambda meeting, rank: caught(play, meeting, rank))
    assert answers[1] == "ZeroDivisionError"
    assert all("rank 1 failed before training: ZeroDivisionError" in str(answers[rank]) for rank in (0, 2))


def alone(play):
    """A world of one needs no store."""
    play(Meeting(Place(0, 1, 0, 1, 0, "environment"), {}), 1)


def caught(play, meeting, rank):
    try:
        return play(meeting, rank)
    except ZeroDivisionError as error:
        return type(error).__name__
