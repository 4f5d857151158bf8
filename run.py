"""A training that can be stopped, killed and continued exactly; and the few things every script of this
project does alike.

    with Run(folder, config, {"model": model, "optimizer": optimizer}) as run:
        for step in run:                                    # from where the checkpoint ended
            loss = ...                                      # its random numbers depend on seed and step alone
            loss.backward()
            run.check({"loss": loss}, model.parameters())   # one mean over processes, one finite check
            optimizer.step()

The folder then holds log.jsonl, a line of JSON each for the configuration and the logged steps, and
checkpoint.pt. Needs torch and numpy, and nothing else of this project.
"""
import argparse
import ast
import atexit
import contextlib
import difflib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as distributed

try:
    import fcntl
except ImportError:                 # Windows, where run folders are not locked
    fcntl = None


# ---------- the run

class Stopped(KeyboardInterrupt):
    """The process was asked to stop; its step and its checkpoint are finished."""


class Run:
    """A training in a folder; see the head of this file.

    config: a dict for JSON. A folder that holds a run of another one is refused, but for the keys in `free`,
    which change no result. The run ends at config["steps"], logs every config["log_every"] steps, and saves
    at the steps config["saves"] and at multiples of the last of them; then sheet(step), if given, draws and
    says where. parts: what the checkpoint holds, by name, each with state_dict and load_state_dict. images:
    of a step, for the progress line. SIGINT and SIGTERM end the step, save, and raise Stopped; SIGINT twice
    stops at once. In a process group (torchrun) each process calls it with its own share of the data; the
    first one writes. Raises ValueError, OSError.
    """

    def __init__(self, folder: Path, config: dict, parts: dict, *, free: Sequence[str] = (),
                 sheet: Callable[[int], object] | None = None, images: int = 0):
        self.folder, self.config, self.parts, self.free = Path(folder), config, parts, free
        self.sheet, self.images, self.row, self.asked, self.stop = sheet, images, {}, False, False
        self.note = lambda images_per_second: ""            # more for the progress line
        self.rank, self.ranks = rank_and_world()

    def __enter__(self) -> "Run":
        if self.rank == 0:
            self._lock()
        try:
            self.first = self._continue()
        except BaseException:               # a notebook keeps it, and with it would keep the lock
            if self.rank == 0:
                self.lock.close()
            raise
        self.started = self.printed = time.time()
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:      # as SIGINT is in the background
                    self.handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rank == 0:
            self.lock.close()

    def _ask(self, number: int, _) -> None:
        if self.asked and number == signal.SIGINT:      # SIGTERM comes twice: from SLURM and from torchrun
            raise KeyboardInterrupt
        self.asked = True
        if self.rank == 0:
            print("\nstopping after this step, with its checkpoint; Ctrl-C again stops at once", flush=True)

    def _lock(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: choose another --out, for a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        try:
            if fcntl:                                               # the system unlocks when the process ends
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise ValueError(f"{self.folder} is in use by another process: choose another --out") from None
        except OSError as error:                                    # as of Lustre
            print(f"{self.folder} cannot be locked ({error.strerror}): start no second run in it")

    def _continue(self) -> int:
        """Load the checkpoint, if there is one, and return its step."""
        first = in_turn(self._load)
        if self.ranks == 1:
            return first
        found = [None] * self.ranks
        distributed.all_gather_object(found, first)
        if len(set(found)) > 1:
            raise ValueError(f"the processes find checkpoints of steps {', '.join(map(str, found))} in "
                             f"{self.folder}: it must be a folder that all of their machines share")
        return first

    def _load(self) -> int:
        path, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        rows, state = read_lines(log), read_checkpoint(path, mmap=False) if path.exists() else None
        asked = json.loads(json.dumps(self.config))
        begun = rows[:1] if rows[1:] else ()                # what did no step binds no other options
        for held in (*begun, *([json.loads(json.dumps(state["config"]))] if state else ())):
            changed = [key for key in {**asked, **held}
                       if key not in self.free and held.get(key) != asked.get(key)]
            if changed:
                raise ValueError(f"{self.folder} holds a run with another {', '.join(changed)}: choose "
                                 "another --out, or the same options to continue it")
        step = state["step"] if state else 0
        for name, part in self.parts.items() if state else ():
            part.load_state_dict(state[name])
        if self.rank == 0:
            kept = [row for row in rows[1:] if row.get("step", 0) <= step]
            write_file(log, "".join(json.dumps(row) + "\n" for row in (self.config, *kept)).encode())
            if state:
                print(f"continuing {self.folder} at step {step}", flush=True)
                threads = torch.get_num_threads()
                if state.get("threads") != threads:
                    print(f"it had {state.get('threads')} threads and has {threads}: its last bits will not "
                          "be those of a run that was never stopped", flush=True)
        return step

    def __iter__(self) -> Iterator[int]:
        if self.first == 0 and 0 in self.config["saves"]:
            self._draw(0)
        self.started = self.printed = time.time()
        for self.step in range(self.first, self.config["steps"]):
            self.row = {}
            yield self.step
            self._end(self.step + 1)

    def check(self, losses: dict[str, torch.Tensor], parameters: Iterable[torch.Tensor]) -> None:
        """Between backward and optimizer. Makes gradients and losses (scalars by name, which are logged)
        means over the processes. Raises ValueError where one is not finite, before any step is taken. It
        waits once for the device."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        found = [loss.detach().float() for loss in losses.values()]
        found = torch.stack([*found, found[0].new_tensor(float(self.asked))])
        if self.ranks > 1:
            for tensor in (*gradients, found):
                distributed.all_reduce(tensor)
                tensor /= self.ranks
        norm = torch.nn.utils.get_total_norm(gradients).float()
        *values, asked, norm = torch.cat([found, norm[None]]).tolist()
        named = {**dict(zip(losses, values)), "gradient": norm}
        wrong = [name for name, value in named.items() if not np.isfinite(value)]
        if wrong:
            raise ValueError(f"step {self.step + 1}: {', '.join(wrong)} not finite; the last checkpoint is "
                             "kept: try a smaller learning rate")
        self.row.update(zip(losses, values))
        self.stop = asked > 0                                       # the same in all processes

    def _end(self, done: int) -> None:
        last, self.stop = done == self.config["steps"], self.stop or (self.asked and self.ranks == 1)
        due = last or self.stop or is_due(done, self.config["saves"])
        if self.rank == 0:
            rate = (done - self.first) / (time.time() - self.started)
            if due or done % self.config["log_every"] == 0:
                row = {"step": done, **self.row, "steps_per_second": float(f"{rate:.3g}")}
                append_row(self.folder / "log.jsonl", row)
            if due:
                save_state(self.folder / "checkpoint.pt", {
                    "config": self.config, "step": done, "threads": torch.get_num_threads(),
                    **{name: part.state_dict() for name, part in self.parts.items()}})
            self.tell(done)
            if due:
                self._draw(done)
        if self.stop:
            raise Stopped(f"stopped after step {done}; the same command continues")

    def _draw(self, step: int) -> None:
        if self.rank == 0 and self.sheet:
            began = time.time()
            print(f"{_return()}step {step}: {self.sheet(step)}", flush=True)
            self.started += time.time() - began                     # the rate is that of steps

    def tell(self, done: float) -> None:
        """Print how far the run is: over the same line on a terminal, elsewhere after 10 seconds and each
        minute. For long steps: done may lie within one."""
        now, steps, first = time.time(), self.config["steps"], self.printed <= self.started
        if self.rank or done < steps and now - self.printed < (0.5 if _return() else 10 if first else 60):
            return
        self.printed, rate = now, (done - self.first) / (now - self.started)
        left = (steps - done) / rate
        text = f"step {round(done, 2):.9g}/{steps}  {rate:.3g} steps/s"
        if self.images:
            text += f" = {rate * self.images:.3g} images/s{self.note(rate * self.images)}"
        if torch.cuda.is_initialized():
            text += f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
        text += f"  {left / 3600:.1f} h left" if left > 5400 else f"  {left / 60:.1f} min left"
        text += "".join(f"  {name} {value:.3g}" for name, value in self.row.items())
        if _return():       # one row, since what wraps cannot be written over
            width = shutil.get_terminal_size().columns - 1
            text = text[:width].ljust(width)
        print(_return() + text, end="" if _return() else "\n", flush=True)


def watched(indices: range, what: str) -> Iterator[int]:
    """The indices, with a line of progress after five seconds, and then every thirty; none for an empty
    name."""
    started = time.time()
    due = started + 5
    for done, index in enumerate(indices):
        if what and time.time() > due:
            left = (time.time() - started) * (len(indices) / done - 1) / 60
            print(f"{what}: {index} of {indices.stop}, {left:.1f} min left", flush=True)
            due = time.time() + 30
        yield index


def rng(seed: int, index: int) -> np.random.Generator:
    """The one source of everything that belongs to `index` (a training step, a sampled image) under `seed`,
    both >= 0. Philox is counter-based: each pair has a stream of its own, whatever was drawn before."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def is_due(step: int, marks: Sequence[int]) -> bool:
    """Whether a step is one of the marks, or a multiple of the last of them."""
    return step in marks or step % marks[-1] == 0


def _return() -> str:
    return "\r" if sys.stdout.isatty() else ""


# ---------- files of a run

def read_checkpoint(path: str | os.PathLike, mmap: bool = True, other: bool = False) -> dict:
    """The dict in a checkpoint of `Run`, or of any file of torch.save with `other`. Nothing in it can run
    code.

    mmap: memory-mapped where the format allows; a file that will be replaced must not be (Windows). Raises
    ValueError.
    """
    try:
        mmap = mmap and zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if isinstance(state, dict) and (other or isinstance(state.get("config"), dict)
                                        and isinstance(state.get("step"), int)):
            return state
        reason = "it holds something else"
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: train first, as python cgn.py does") from None
    except Exception as error:              # whatever a hostile or broken file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Torch's advice to read it all the same is not repeated.
        if "weights" in reason.lower() and not isinstance(error, OSError):
            reason = "it is damaged, or holds more than tensors and could run code"
    raise ValueError(f"{path} is no checkpoint ({reason}): name the checkpoint.pt of a run")


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; none where there is no file. ValueError where a line is no such
    object."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else ()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("step", 0), int):
            raise ValueError(f"{path}, line {number + 1}, is damaged: remove that line")
    return rows


def append_row(path: Path, row: dict) -> None:
    """Append a line of JSON, all of it or nothing. Raises OSError."""
    line = (json.dumps(row) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):                # a disk that is nearly full takes a part
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror}): make room; what was there is intact"
                      ) from None


def save_state(path: Path, state: dict) -> None:
    """torch.save, atomically. Raises OSError."""
    write_file(path, partial(torch.save, state))


def write_file(path: str | os.PathLike, content: bytes | Callable) -> None:
    """Write bytes, or what content(file) writes, under a temporary name, then rename: `path` holds the old
    content or the new, never half of it. Raises OSError."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            content(file) if callable(content) else file.write(content)
        part.replace(path)
    except (OSError, RuntimeError) as error:                # torch.save raises the latter for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): make room or choose another --out; what was "
                      "there is intact") from None
    finally:
        part.unlink(missing_ok=True)


# ---------- devices and processes

def rank_and_world() -> tuple[int, int]:
    """This process's number in its group and the group's size; 0, 1 without one."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def in_turn(work: Callable):
    """What work() gives; in a group the first process goes before the others."""
    rank, ranks = rank_and_world()
    if rank > 0:
        distributed.barrier()
    done = work()
    if rank == 0 and ranks > 1:
        distributed.barrier()
    return done


def join_group(device: str | None) -> str:
    """Join the other processes where torchrun has started this one; returns the device to use, see
    `find_device`."""
    device = find_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=6))     # while one fetches or draws
    return device


def one_process(what: str) -> None:
    """Raises ValueError under torchrun, for what several processes would do over one another."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{what} runs in one process: start it without torchrun")


def find_device(name: str | None = None) -> str:
    """The device of that name; auto or None: cuda where there is one, else mps, else cpu. Of torchrun's
    processes each has a GPU of its own. Raises ValueError where it is not here."""
    if name in (None, "auto"):
        apple = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)         # whose memory and rate are measured
        torch.zeros(1, device=name).item()
    except Exception:                       # each kind of device has errors of its own
        raise ValueError(f"--device {name}: torch finds no such device here: choose cpu") from None
    if name.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif name == "cpu":
        if torch.cuda.is_available():
            print("computing on the CPU; there is a GPU, which is faster: leave --device off")
        if torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ:     # nor --threads
            spare_busy_cores()
    return name


def spare_busy_cores() -> None:
    """Compute with fewer threads where that is faster: all wait for the slowest, which is the one whose core
    another program keeps busy."""
    x, weight, all_threads = torch.ones(64, 32, 16, 16), torch.ones(32, 32, 3, 3), torch.get_num_threads()

    def done(threads):
        torch.set_num_threads(threads)
        count, end = 0, time.time() + 0.1
        while time.time() < end:
            torch.conv2d(x, weight)
            count += 1
        return count

    counts = {all_threads, all_threads - 1, all_threads - 2, all_threads // 2} - {-1, 0}
    rates = dict.fromkeys(sorted(counts, reverse=True), 0)
    for _ in range(3):
        for threads in rates:
            rates[threads] += done(threads)
    threads = max(rates, key=lambda threads: rates[threads] * (1.1 if threads == all_threads else 1))
    torch.set_num_threads(threads)
    if threads < all_threads:
        print(f"other programs keep cores busy: computing with {threads} of {all_threads} threads; --threads "
              "sets another number")


def bf16_pays(wanted: bool, device: str) -> bool:
    """Whether to compute in bfloat16: if it is `wanted`, but not on a CPU that only emulates it, where a
    convolution takes ten times as long as in float32; then a line says so."""
    if not wanted:
        return False
    if device.startswith("cuda"):
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not pays:
        print(f"--bf16: this {device} has no bfloat16 instructions; float32 is faster here, and used")
    return pays


# ---------- processes that read ahead

class Items(partial):
    """A data set: item i is the function's value at i, which workers make ahead. Ctrl-C and SIGTERM may reach
    these as well: they leave them to their parent."""
    __getitem__ = partial.__call__

    def ahead(self, indices: range, workers: int, batch_size: int | None = None):
        return iter(torch.utils.data.DataLoader(self, batch_size, sampler=indices, num_workers=workers,
                                                worker_init_fn=ignore_signals))


def ignore_signals(_):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Those that an error has left: they ignore the SIGTERM by which Python ends them when it exits."""
    left = [worker for worker in multiprocessing.active_children() if worker.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # their end is no news
    for worker in left:
        worker.kill()


@contextlib.contextmanager
def one_line(what: str):
    """Whatever a file or a network of others raises, as a ValueError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__} {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def worker_errors():
    """A worker's error, and its death, which torch raises from a signal wherever we are, as a ValueError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        first, *_, last = 2 * (str(error).strip().splitlines() or [""])
        if last.startswith("ValueError: "):
            raise ValueError(last.removeprefix("ValueError: ")) from None
        if not re.search("DataLoader worker|shared memory|/torch_", str(error)):
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # another one that ends now is no more news
        raise ValueError(f"{last if first.startswith('Caught') else first} Memory, or shared memory (docker: "
                         "--shm-size), may be too small: try fewer --workers, 0 for none") from None


# ---------- scripts

def command(parser: argparse.ArgumentParser, main: Callable, argv: list[str] | None = None) -> None:
    """Run main(args). What a user can mend is one line on stderr and exit code 2; Ctrl-C is one line and
    130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a console that cannot show a character shows another
            stream.reconfigure(errors="replace")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(str(message).split())}\n")
    args = parser.parse_args(argv)
    try:
        if getattr(args, "seed", None) is not None and not 0 <= args.seed < 2 ** 63:
            raise ValueError(f"--seed {args.seed}: must be in 0..2^63 - 1")
        for name in ("steps", "batch", "threads"):
            if getattr(args, name, None) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
        if args.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(args.threads)           # as if it had been set outside
            torch.set_num_threads(min(args.threads, os.cpu_count()))
        main(args)
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: give a smaller --batch, or another --device")
    except NotImplementedError as error:        # mps has not all operations
        parser.error(f"{str(error).splitlines()[0]}: give --device cpu")
    except RuntimeError as error:
        parser.error(lost_process(error))
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\n{str(stop) or 'stopped'}\n")


def lost_process(error: RuntimeError) -> str:
    """What to say where memory is full or another process of the group has ended; other errors are raised
    again."""
    if "can't allocate memory" in str(error):
        return "memory is full: ask for fewer images, or give a smaller --batch"
    if not distributed.is_initialized() or not re.search("onnection|NCCL|gloo|pipe", str(error)):
        raise error
    return (f"another process of the run has ended ({str(error).splitlines()[0]}); the last checkpoint is "
            "kept: the same command continues")


def refuse_options(args: argparse.Namespace, meaningful: Iterable[str], what: str) -> None:
    """Raises ValueError for an option that was given (its default is None) and means nothing for `what`."""
    for name, value in vars(args).items():
        if value is not None and value is not False and name not in meaningful:
            raise ValueError(f"--{name.replace('_', '-')} means nothing for {what}: leave it off")


def override(config: dict, values: Sequence[str] | None) -> None:
    """Set config[name] for each "name=value", with the type that it has. Raises ValueError for what does not
    fit."""
    for text in values or ():
        name, _, value = text.partition("=")
        if name not in config:
            near = difflib.get_close_matches(name, config, 1) or [", ".join(config)]
            raise ValueError(f"--set {text}: there is no {name!r}: did you mean {near[0]}?")
        old = config[name]
        try:
            new = value if isinstance(old, str) else ast.literal_eval(value)
            parts, kind = (new, type(old[0])) if isinstance(old, (tuple, list)) and old else ((), None)
            if type(old)(new) != new or [kind(part) for part in parts] != [*parts]:
                raise ValueError
            config[name] = type(old)(new)
        except (ValueError, TypeError, SyntaxError, OverflowError):
            raise ValueError(f"--set {text}: a value like {old!r} is needed") from None


def check_output(path: str | os.PathLike, *inputs: str | os.PathLike) -> Path:
    """The path of a file to be written, before the work: its folder is made. Raises ValueError for an input's
    path and for a folder or a device, OSError where the folder cannot be made."""
    path = Path(path)
    if path.resolve() in [Path(file).resolve() for file in inputs if file]:
        raise ValueError(f"{path} is what is read: choose another name for the output")
    if path.exists() and not path.is_file() or path.parent.is_file():
        raise ValueError(f"{path} is no file, or not in a folder: choose another name for the output")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_apart(out: str | os.PathLike, *folders: str | os.PathLike) -> None:
    """Raises ValueError for an output in a folder that is read."""
    place = Path(out).resolve()
    for folder in folders:
        if Path(folder).resolve() in (place, *place.parents):
            raise ValueError(f"--out {out} is in {folder}, which is read: choose another")
