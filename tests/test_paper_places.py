"""Holding folders and sharing a GPU, without one: locks between processes, and a place whose free memory is told."""

import os
import subprocess

from rwn_ext.paper.places import Place, claim, places

GIB = 2**30


def test_a_folder_is_held_until_the_last_who_inherits_it_is_killed(tmp_path):
    """A run goes on when its sweep is killed: nobody else may start it."""
    held = claim(tmp_path)
    assert held is not None and claim(tmp_path) is None
    with subprocess.Popen(["sleep", "60"], pass_fds=[held]) as run:
        os.close(held)
        assert claim(tmp_path) is None
        run.kill()
        run.wait()
    assert claim(tmp_path) is not None


def test_the_first_run_of_a_kind_is_measured_and_then_as_many_go_as_fit():
    free = [80 * GIB]
    place = Place("cuda:0", lambda: free[0])
    assert place.limited and place.has_room("wrn")
    place.enter("first", "wrn")
    for taken in (5, 30, 25):
        free[0] = (80 - taken) * GIB
        place.watch("first", has_peaked=False)
        assert not place.has_room("wrn"), "its need is not known yet"
    place.watch("first", has_peaked=True)
    # It took 30 at most: two fit in 95 % of 80, three do not.
    assert place.has_room("wrn")
    place.enter("second", "wrn")
    free[0] = 20 * GIB
    assert not place.has_room("wrn")
    # Another kind waits until it can be measured alone.
    free[0] = 55 * GIB
    place.leave("first")
    assert place.has_room("wrn") and not place.has_room("densenet")
    # Memory that others took meanwhile counts.
    free[0] = 29 * GIB
    assert not place.has_room("wrn")
    place.leave("second")
    free[0] = 10 * GIB
    assert place.has_room("densenet"), "an empty place takes anything: what does not fit then says so itself"


def test_one_run_beside_another_is_not_measured():
    free = [80 * GIB]
    place = Place("cuda:0", lambda: free[0])
    place.enter("one", "small")
    place.watch("one", has_peaked=True)
    place.enter("two", "small")
    free[0] = 10 * GIB
    place.watch("two", has_peaked=True)
    assert place.has_room("small"), "what two take is not what one takes"


def test_the_cpu_has_room_and_each_process_of_torchrun_a_gpu_of_its_own(monkeypatch):
    (cpu,) = places("cpu")
    cpu.enter("run", "kind")
    assert cpu.has_room("kind") and not cpu.limited and cpu.device == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [place.device for place in places("cuda")] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [place.device for place in places("cuda:2")] == ["cuda:2"]
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert [place.device for place in places("cuda")] == ["cuda:1"]
