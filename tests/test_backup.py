"""Copies of a log that is at work."""

import itertools

from conftest import booking, bookkeeping


def test_a_copy_that_is_read_while_a_company_is_forgotten_starts(tmp_path, monkeypatch):
    """Read line by line, front to back, with pauses between which any of its lines are emptied."""
    path = tmp_path / "log.jsonl"
    with bookkeeping(path) as keeper:
        keeper.book([booking("gone"), booking("kept"), booking("gone", account="1")])
        for account in ("2", "3"):
            keeper.correct(0, account)
        keeper.correct(2, "2")
        states = [path.read_bytes().splitlines(keepends=True)]
        empty = keeper.log.empty

        def watched(seq):
            empty(seq)
            states.append(path.read_bytes().splitlines(keepends=True))

        monkeypatch.setattr(keeper.log, "empty", watched)
        assert keeper.forget("gone") == 2
    assert len(states) == 6
    copy = tmp_path / "copy.jsonl"
    for early, late in itertools.combinations(states, 2):
        for lines in range(len(early)):
            copy.write_bytes(b"".join(early[:lines] + late[lines:]))
            with bookkeeping(copy) as keeper:
                assert len(keeper.log) == 6
