"""What else the machine did: counters of made-up files, and of this machine where it has them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.judge.results.machine_load import MachineLoad
from spdbench.measure import machine_watch as module
from spdbench.measure import process_times
from spdbench.measure.machine_watch import MachineWatch
from spdbench.measure.process_times import ProcessTimes, cpu_ns, own_cpu_ns

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
S = 10**9


class Machine:
    """A folder with the files of /proc and /sys, two processors, a clock and our own processor time."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.now_s = self.own_s = 0.0
        (self.proc / "pressure").mkdir(parents=True)
        self.processor = self.sys / "devices" / "system" / "cpu" / "cpu0"
        for name in ("thermal_throttle", "cpufreq"):
            (self.processor / name).mkdir(parents=True)
        (self.sys / "group").mkdir()
        self.write()

    def write(self, idle_s: float = 0, steal_s: float = 0, **counted: int) -> None:
        """Puts counters into the files; `idle_s` and `steal_s` are of each processor."""
        idle, steal = round(idle_s * TICKS_PER_S), round(steal_s * TICKS_PER_S)
        one = f"1 2 3 {idle} 0 4 5 {steal} 0 0"
        both = f"2 4 6 {2 * idle} 0 8 10 {2 * steal} 0 0"
        (self.proc / "stat").write_text(f"cpu  {both}\ncpu0 {one}\ncpu1 {one}\nintr 7 0\n")
        (self.proc / "uptime").write_text(f"{self.now_s:.2f} {2 * idle_s:.2f}\n")
        (self.proc / "pressure" / "memory").write_text(
            f"some avg10=0.00 total={counted.get('memory_us', 0)}\nfull avg10=0.00 total=0\n"
        )
        (self.processor / "thermal_throttle" / "package_throttle_total_time_ms").write_text(
            f"{counted.get('hot_ms', 0)}\n"
        )
        (self.processor / "cpufreq" / "scaling_cur_freq").write_text(f"{counted.get('khz', 3_000_000)}\n")
        (self.sys / "group" / "cpu.stat").write_text(
            f"usage_usec 5\nnr_throttled 1\nthrottled_usec {counted.get('throttled_us', 0)}\n"
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(module, "usable_processors", lambda: [0, 1])
    monkeypatch.setattr(module, "limiting_group", lambda: made.sys / "group")
    monkeypatch.setattr(module, "own_cpu_ns", lambda: round(made.own_s * S))
    monkeypatch.setattr(module, "MAX_SOURCE_NS", S)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return made


@pytest.fixture
def watch(machine: Machine) -> Iterator[MachineWatch]:
    made = MachineWatch(proc=machine.proc, sys_=machine.sys)
    yield made
    made.close()


def load(
    machine: Machine, watch: MachineWatch, own_s: float, monkeypatch: pytest.MonkeyPatch, **written: float
) -> MachineLoad:
    """Of one second."""
    monkeypatch.setattr("spdbench.measure.machine_watch.time.perf_counter_ns", lambda: round(machine.now_s * S))
    before = watch.read()
    machine.now_s, machine.own_s = machine.now_s + 1, machine.own_s + own_s
    machine.write(**written)  # type: ignore[arg-type]
    return watch.load(before, watch.read())


def test_what_is_neither_idle_nor_ours_nor_stolen_is_of_others(
    machine: Machine, watch: MachineWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load(machine, watch, 1.2, monkeypatch, idle_s=0.2, steal_s=0.1)
    assert found.others == pytest.approx((2 - 0.4 - 0.2 - 1.2) / 2)
    assert found.steal == pytest.approx(0.1)
    assert (found.wall_s, found.cores) == (1, 2)
    assert found.disturbed


def test_a_machine_that_is_ours_alone_is_not_disturbed(
    machine: Machine, watch: MachineWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load(machine, watch, 1.0, monkeypatch, idle_s=0.5)
    assert found.others == 0
    assert not found.disturbed
    assert found.who == []


def test_a_tick_too_much_of_idle_time_is_kept_and_cancels_over_many_requests(
    machine: Machine, watch: MachineWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(machine, watch, 1.0, monkeypatch, idle_s=0.51).others == pytest.approx(-0.01)


@pytest.mark.parametrize(
    ("counted", "name", "share"),
    [
        ({"throttled_us": 500_000}, "throttled", 0.25),
        ({"hot_ms": 300}, "hot", 0.3),
        ({"memory_us": 200_000}, "memory", 0.2),
        ({"memory_us": 5_000_000}, "memory", 1.0),
    ],
)
def test_what_held_a_request_up_is_a_share_of_its_time(
    machine: Machine,
    watch: MachineWatch,
    monkeypatch: pytest.MonkeyPatch,
    counted: dict[str, int],
    name: str,
    share: float,
) -> None:
    found = load(machine, watch, 1.0, monkeypatch, idle_s=0.5, **counted)
    assert getattr(found, name) == pytest.approx(share)
    assert found.taken == pytest.approx(share)
    assert found.disturbed


def test_the_clock_is_that_after_the_request(
    machine: Machine, watch: MachineWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(machine, watch, 1.0, monkeypatch, idle_s=0.5, khz=2_400_000).clock_mhz == 2400


def test_only_the_processors_that_we_may_use_count(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_processors", lambda: [1])
    watch = MachineWatch(proc=machine.proc, sys_=machine.sys)
    found = load(machine, watch, 0.25, monkeypatch, idle_s=0.5)
    assert found.others == pytest.approx(0.25)
    assert found.cores == 1
    watch.close()


def test_a_slow_source_is_replaced_or_left_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/stat of a machine with hundreds of processors takes too long; /proc/uptime has the idle time alone."""
    cost_ns = module._cost_ns
    monkeypatch.setattr(module, "_cost_ns", lambda source: S * 2 if "steal" in source() else cost_ns(source))
    watch = MachineWatch(proc=machine.proc, sys_=machine.sys)
    found = load(machine, watch, 0.8, monkeypatch, idle_s=0.5)
    assert found.others == pytest.approx(0.1)
    assert found.steal is None
    watch.close()


def test_a_system_that_shows_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "limiting_group", lambda: None)
    watch = MachineWatch(proc=tmp_path / "none", sys_=tmp_path / "none")
    found = watch.load(watch.read(), watch.read())
    assert found.model_dump(exclude={"wall_s", "cores", "major_faults"}, exclude_none=True) == {"who": []}
    assert not found.disturbed
    watch.close()


def test_files_that_vanish_are_unknown_from_then_on(machine: Machine, watch: MachineWatch) -> None:
    before = watch.read()
    watch.close()  # each read fails now, as of a container's files that are taken away
    after = watch.read()
    assert "idle" in before
    assert "idle" not in after
    assert watch.load(before, after).others is None
    assert machine.proc.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="processor time of other processes by their number is Linux's")
def test_the_process_that_used_most_time_is_named(tmp_path: Path) -> None:
    """The only one that is looked at: how busy the machine is does not matter."""
    times = ProcessTimes(tmp_path)
    # Its shell ends at once, so that it is no descendant of this process.
    command = ["sh", "-c", '"$0" -c "while True: pass" > /dev/null 2>&1 & echo $!', sys.executable]
    busy = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (tmp_path / str(busy)).symlink_to(f"/proc/{busy}")
    try:
        start = cpu_ns(busy)
        while cpu_ns(busy) - start < S / 5:
            time.sleep(0.01)
        name = Path(f"/proc/{busy}/comm").read_text().strip()
        assert f"{name} (pid {busy})" in times.busiest(S / 5)
        assert times.busiest(lost_ns=1000 * S) == []  # too little of that is its doing
    finally:
        os.kill(busy, signal.SIGKILL)


def test_what_this_process_started_and_what_started_it_are_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell starts make, which starts this process, which starts a worker that starts a compiler."""
    parents = {1: 0, 20: 1, 30: 20, os.getpid(): 30, 40: os.getpid(), 41: 40, 50: 20, 60: 1}
    for process, parent in parents.items():
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "stat").write_text(f"{process} (a) b) S {parent} 0 0")
        (tmp_path / str(process) / "comm").write_text(f"p{process}\n")
    spent = dict.fromkeys(parents, 0)
    monkeypatch.setattr(process_times, "cpu_ns", spent.get)
    monkeypatch.setattr(process_times, "workers", lambda: [40])
    times = ProcessTimes(tmp_path)
    spent.update({process: S + process for process in parents})
    assert times.busiest(S) == ["p60 (pid 60)", "p50 (pid 50)"]


@pytest.mark.skipif(sys.platform != "linux", reason="processor time of other processes by their number is Linux's")
def test_the_time_of_children_that_have_ended_is_ours() -> None:
    before = own_cpu_ns()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert own_cpu_ns() - before >= 0.3 * S


def test_a_process_that_does_not_exist_used_no_time() -> None:
    assert cpu_ns(2**22 + 1) == cpu_ns(0) == 0
