"""Staff: the processes of a run: who is there, who is started again, who was given up.

What a process is is said by its spec; whether it may be started again by the supervisor; what
becomes of a worker's samples by the controller. Here these three meet.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distbelief.controller.entry import Admit, Leave, Lose, LoseShard
from distbelief.controller.standby import Standby
from distbelief.engine import Engine, Process
from distbelief.folder import RunFolder
from distbelief.grants import Grants
from distbelief.job import Job
from distbelief.keyring import Keyring
from distbelief.param_server.contract import Contract
from distbelief.param_server.secret import Secret
from distbelief.problem import Problem
from distbelief.spec import Spec
from distbelief.supervisor import Supervisor

TICK_S = 0.05
EXIT_TIMEOUT_S = 10.0
"""Time for processes that have said their last word to exit."""
SHARD_SILENCE_S = 10.0
"""A shard that has told nothing for so long is frozen: it is ended and started again."""


class Staff:
    """See the top of this file. Used by one thread."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        engine: Engine,
        standby: Standby,
        say: Callable[[str], None],
        token: Secret,
        keyring: Keyring | None,
        attempt: int,
        contract: Contract | None,
        notice: Callable[[str, str, str], None] = lambda kind, who, text: None,
        monitor: Callable[[], str] = str,
    ) -> None:
        """attempt, contract: as of `Run`. keyring: None where nothing is encrypted. notice: told
        what happens, as of `Chronicler`. monitor: where reports go by now, empty for nowhere."""
        self.shard_restarts = 0
        self._job = job
        self._folder = folder
        self._standby = standby
        self._controller = standby.controller
        """To be read. What is to be done to it goes through the standby."""
        self._say = say
        self._token = token
        self._keyring = keyring
        self._contract = contract
        self._notice = notice
        self._monitor = monitor
        self._engine = engine
        self._grants = Grants(folder.path, attempt)
        self._supervisor = Supervisor(job.restarts)
        self._workers: dict[str, Process] = {}
        self._shards: dict[str, Process] = {}
        self._specs: dict[str, Spec] = {}
        """Of the newest process of each name."""
        self._proof: dict[str, int] = {}
        """By shard, the pushes that were answered before it was started again."""
        self._wanted = 0
        """Workers that were asked for while it trains, until there are so many."""
        self._said_drained: set[str] = set()
        self._cut_short: set[str] = set()
        """Workers that were ended before they could say that they have left."""
        self._given_up: set[str] = set()
        """Workers that are not started again."""

    @property
    def workers(self) -> list[str]:
        """All that were ever started, the newest last."""
        return list(self._workers)

    @property
    def shards(self) -> list[str]:
        return list(self._shards)

    def num_lost(self, name: str) -> int:
        """How often a process of that name was lost."""
        return self._supervisor.num_lost(name)

    def is_given_up(self, name: str) -> bool:
        """It is not started again."""
        return name in self._given_up

    @property
    def has_given_up(self) -> bool:
        """Some worker is not started again."""
        return bool(self._given_up)

    @property
    def are_all_drained(self) -> bool:
        return all(map(self._controller.is_leaving, self._workers))

    @property
    def are_shards_gone(self) -> bool:
        """Every shard has said its last word, or its process has ended."""
        ended = self._controller.ended
        return all(s.name in ended or s.poll() is not None for s in self._shards.values())

    @property
    def is_any_waiting(self) -> bool:
        """Some worker will be started again."""
        return any(map(self._supervisor.is_waiting, self._workers))

    @property
    def is_short(self) -> bool:
        """Workers that are asked for are not started yet."""
        queue = self._controller.queue
        is_over = queue.is_stopped or queue.is_finished
        return not is_over and self._wanted > len(self._active)

    def start(self) -> None:
        """Start all. Raises: Problem."""
        self._say(f"starting {self._job.shards} shards and {self._job.workers} workers")
        for role, count in (("shard", self._job.shards), ("worker", self._job.workers)):
            for index in range(count):
                self._start_one(self._make_spec(role, index))

    def start_due(self, now: float) -> None:
        """Start again whose time has come. Raises: Problem."""
        for name in self._supervisor.due(now):
            self._start_one(self._specs[name])

    def look(self, now: float) -> list[Process]:
        """See who has ended, and have them started again; returns the workers that run.

        Raises: Problem where too many were lost.
        """
        self.look_after_shards(now)
        running = [w for w in list(self._workers.values()) if not self._has_ended(w, now)]
        self._give_up_silent(now, running)
        return running

    def look_after_shards(self, now: float) -> None:
        """Have shards that are lost, or frozen, started again. Raises: Problem."""
        controller, supervisor = self._controller, self._supervisor
        self._engine.look(now)
        for name, shard in self._shards.items():
            if supervisor.is_waiting(name):
                continue
            why = shard.poll()
            heard = controller.heard(name)
            is_silent = heard is not None and now - heard > SHARD_SILENCE_S
            if why is None and is_silent and self._standby.is_current:
                why = f"it has said nothing for more than {SHARD_SILENCE_S:.0f} s"
                shard.kill()  # before there is another one
            if why is None:
                if controller.num_pushed > self._proof.get(name, -1):
                    supervisor.prove(name)
                continue
            if name in controller.ended:
                if not controller.ended[name][0] and not controller.is_halting_shards:
                    self._start_shard_again(name, "was asked to end", "with what it has saved")
                    supervisor.again(name, now)
                continue  # an error is told by `_check`
            why = why or "it ended without a word"
            delay = supervisor.lose(name, why, now)
            if delay is None:
                raise Problem(
                    "DB-RUN-003",
                    f"{name} is lost ({supervisor.cause(name)})",
                    why=f"it was lost {supervisor.num_lost(name)} times, the last "
                    f"{self._job.restarts + 1} in a row without a push being answered between",
                    fix=f"see {self._folder.logs}; distbelief resume goes on from what was saved",
                )
            self._start_shard_again(name, f"is lost ({why})", "from its last snapshot")

    def heed_asked(self) -> None:
        """Do what others have asked for: drain, scale."""
        for what, text in self._folder.take_asked().items():
            verb, _, name = what.partition("-")
            if verb == "drain" and name in self._workers:
                self._drain(name)
            elif verb == "scale" and text.isdecimal():
                self._scale(int(text))
        self._fill()

    def heed_leaving(self) -> None:
        """Have processes leave whose host is about to be taken away; others take their places."""
        active = self._active
        for name in self._engine.leaving():
            member = self._controller.members.get(name)
            if name in self._shards and member is not None:
                self._say(f"{name} is asked to move: its host is about to be taken away")
                self._notice("drain", name, f"{name} is asked to move to another host")
                self._engine.ask_to_end(name, member.pid)
            elif name in active:
                self._wanted = max(self._wanted, len(active))
                self._drain(name)

    def end_unneeded(self, running: list[Process]) -> None:
        """At the end nobody waits for workers for which there was never room."""
        queue, members = self._controller.queue, self._controller.members
        if not (self._job.min_workers and (queue.is_finished or queue.is_stopped)):
            return
        for worker in running:
            member = members.get(worker.name)
            if member is None or member.inc != self._specs[worker.name].inc:
                self._cut_short.add(worker.name)
                worker.kill()

    def let_exit(self) -> None:
        """What a script has left to do when Python exits is its own; nobody waits for long."""
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while time.monotonic() < deadline and any(p.poll() is None for p in self._processes):
            time.sleep(TICK_S)

    def close(self) -> None:
        """End all that run."""
        for process in self._processes:
            process.kill()

    # Inside

    @property
    def _processes(self) -> list[Process]:
        return [*self._workers.values(), *self._shards.values()]

    def _make_spec(self, role: str, index: int) -> Spec:
        spec = Spec(
            role=role,
            index=index,
            inc=0,
            run=self._folder.run,
            token=self._token,
            controller=self._standby.endpoint,
            job=self._job.to_json(),
            run_path=str(self._folder.path.resolve()),
            cwd=str(Path.cwd()),
            is_warm=role == "shard" or self._job.warm_workers,
            contract=""
            if self._contract is None or role == "worker"
            else self._contract.to_json().decode(),
        )
        return spec if self._keyring is None else replace(spec, keys=self._keyring.of(spec.name))

    def _start_one(self, spec: Spec) -> None:
        """Start a process, under a number that none of its name had before."""
        # Where the controller is by now: it may have had to move.
        spec = replace(
            spec,
            inc=self._grants.next(spec.name),
            controller=self._standby.endpoint,
            monitor=self._monitor(),
        )
        self._specs[spec.name] = spec
        self._standby.do(Admit(spec.name))
        processes = self._shards if spec.role == "shard" else self._workers
        process = self._engine.start(spec)
        if spec.role == "worker":
            processes.pop(spec.name, None)  # the newest is the last one
        processes[spec.name] = process

    def _has_ended(self, worker: Process, now: float) -> bool:
        controller, supervisor = self._controller, self._supervisor
        name = worker.name
        if name in controller.ended:  # its process may still be at what Python does at exit
            self._say_drained(name)
            return True
        why = worker.poll()
        if why is None:
            if controller.pushed[name]:
                supervisor.prove(name)
            return False
        if supervisor.is_waiting(name) or name in self._given_up | self._cut_short:
            return True
        self._standby.follow(0.0)  # its last word may have come with it
        if name in controller.ended:
            self._say_drained(name)
            return True
        if controller.is_leaving(name):  # before it could say its last word
            self._standby.do(Lose(name))
            self._cut_short.add(name)
            self._say_drained(name)
            return True
        why = controller.quarantined.get(name) or why or "it ended without a word"
        samples = self._standby.do(Lose(name))
        text = (
            f"worker {name} is lost ({why}): of {samples} samples it had not finished, those that "
            "no shard has go to the others"
        )
        delay = None
        if not (controller.queue.is_stopped or controller.queue.is_finished):
            delay = supervisor.lose(name, why, now)
        if delay is None:
            self._given_up.add(name)
        else:
            text += "; it is started again" + (f" in {delay:.1f} s" if delay else "")
        self._say(text)
        self._notice("crash", name, f"{name} is lost: {why}")
        if not (controller.queue.is_stopped or controller.queue.is_finished):
            self._check_number()
        return True

    @property
    def _active(self) -> list[str]:
        """Workers that train or will, the newest last."""
        gone = self._controller.ended.keys() | self._given_up | self._cut_short
        controller = self._controller
        return [
            name
            for name in self._workers
            if name not in gone
            # SIGTERM to a worker is no request of ours; it says itself that it leaves.
            and not (controller.is_asked_to_leave(name) or controller.is_leaving(name))
        ]

    def _check_number(self) -> None:
        """Raises: Problem where workers that were given up leave too few."""
        left, least = self._active, self._job.min_workers
        if not self._given_up or len(left) >= least:
            return
        causes = [f"{name}: {self._supervisor.cause(name)}" for name in sorted(self._given_up)]
        raise Problem(
            "DB-RUN-005",
            f"{len(left)} workers are left, and min_workers is {least}",
            why="given up: " + ", ".join(causes),
            fix=f"see {self._folder.logs}; distbelief resume goes on from what was saved",
        )

    def _say_drained(self, name: str) -> None:
        if self._controller.is_leaving(name) and name not in self._said_drained:
            self._said_drained.add(name)
            self._say(f"worker {name} was drained: what it had not finished goes to the others")
            self._notice("leave", name, f"{name} has left, as it was asked to")

    def _drain(self, name: str) -> None:
        self._say(f"worker {name} is asked to leave")
        self._notice("drain", name, f"{name} is asked to leave")
        self._standby.do(Leave(name))

    def _scale(self, number: int) -> None:
        """Go on with so many workers: the newest leave, or others are started."""
        job, active = self._job, self._active
        if not (job.min_workers or job.workers) <= number <= job.workers:
            text = (
                f"{number} workers were asked for, and the job has {job.min_workers or job.workers}"
            )
            self._say(f"{text} to {job.workers}")
            return
        self._say(f"from {len(active)} workers to {number}")
        self._notice("scale", "", f"from {len(active)} workers to {number}")
        self._wanted = number
        for name in active[number:]:
            self._drain(name)

    def _fill(self) -> None:
        """Start the workers that were asked for, once processes of their names have ended."""
        job, missing = self._job, self._wanted - len(self._active)
        if missing <= 0:
            self._wanted = 0  # who leaves from here on is not replaced
            return
        free = [i for i in range(job.workers) if self._is_free(f"w{i}")]
        for index in free[:missing]:
            spec = self._make_spec("worker", index)
            self._given_up.discard(spec.name)
            self._cut_short.discard(spec.name)
            self._said_drained.discard(spec.name)
            self._supervisor.renew(spec.name)
            self._start_one(spec)

    def _is_free(self, name: str) -> bool:
        """No process is of that name any more."""
        worker = self._workers.get(name)
        return worker is None or (
            worker.poll() is not None and not self._supervisor.is_waiting(name)
        )

    def _start_shard_again(self, name: str, why: str, how: str) -> None:
        """Make ready for the next process of a shard."""
        port = self._standby.do(LoseShard(name)).rpartition(":")[2]
        self._proof[name] = self._controller.num_pushed
        self.shard_restarts += 1
        # On the port it had, its workers find it without asking.
        self._specs[name] = replace(self._specs[name], port=int(port or self._specs[name].port))
        self._say(f"{name} {why}: it is started again {how}")
        self._notice("crash", name, f"{name} {why}")

    def _give_up_silent(self, now: float, running: list[Process]) -> None:
        """A worker that is frozen holds leases that nobody else gets: end it."""
        if not self._standby.is_current:
            return
        silent = self._controller.silent(now, self._job.silence_s)
        quiet = self._controller.silent(now, SHARD_SILENCE_S)
        for worker in running:
            if worker.name in quiet and not worker.is_reachable:
                self._say(f"worker {worker.name} is given up: its host does not answer")
                worker.kill()
            elif worker.name in silent:  # found as lost by the next look
                self._say(
                    f"worker {worker.name} has said nothing for {self._job.silence_s:.0f} s and "
                    "is ended (silence_s says how long one may be silent)"
                )
                worker.kill()
