"""A CPU that PyTorch's users take for an H200, so that lines written for a GPU run where there is none.

Inside `stand_in_gpu()` tensors asked for on "cuda" lie in CPU memory and say that they are on "cuda:0"; `torch.cuda`
answers. Triton's kernels must be interpreted. Every call of CUDA's interface is counted by name. Times come from a
clock that moves by what each launch would take at least, so that no number depends on the machine.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

NAME = "NVIDIA H200, rehearsed on a CPU"
CAPABILITY = (9, 0)
MEMORY = 141 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAUNCH, BANDWIDTH = 3e-6, 4.3e12  # seconds, bytes a second
KERNELS = {"zero_", "copy_", "mm", "matmul", "__matmul__", "linear", "addmm_", "add_"}
"""PyTorch's functions that a profiler shows as kernels."""
LOST = "CUDA error: an illegal memory access was encountered"


class StandInGpu(TorchFunctionMode):
    """`calls` counts CUDA's interface by name; `faults` maps (name, which call) to the error that it raises."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.faults: dict[tuple[str, int], Exception] = {}
        self.lost = False
        self.seconds = 0.0
        self.profiles: list[_Profile] = []
        self.capture: _Capture | None = None

    def called(self, name: str) -> None:
        """Counts a call, and raises what is planned for it; nothing works once the context is lost."""
        self.calls[name] += 1
        fault = self.faults.pop((name, self.calls[name]), None)
        if fault is not None:
            self.lost |= str(fault).startswith(LOST)
            raise fault
        if self.lost:
            raise RuntimeError(LOST)

    def launched(self, name: str, arguments) -> None:
        """Moves the clock by one kernel."""
        tensors = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
        spent = max(LAUNCH, sum(tensor.nbytes for tensor in tensors.values()) / BANDWIDTH)
        for profile in self.profiles:
            profile.add(name, self.seconds, spent)
        self.seconds += spent

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Who counts on fake tensors counts for a GPU already.
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        if func in _GETTERS:
            return _GETTERS[func]
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "get_device":
            return 0
        args, kwargs = tuple(map(on_cpu, args)), {key: on_cpu(value) for key, value in kwargs.items()}
        if name in KERNELS:
            self.launched(name, (args, kwargs))
        if name == "histc":
            # A CPU counts no whole numbers.
            args = (args[0].float(), *args[1:])
        if kwargs.get("out_dtype") is not None:
            # A CPU's GEMM has no other output type than its inputs'.
            return torch.mm(*(matrix.to(kwargs["out_dtype"]) for matrix in args))
        return func(*args, **kwargs)


_GETTERS = {torch.Tensor.device.__get__: CUDA, torch.Tensor.is_cuda.__get__: True}


def on_cpu(value):
    """The CPU in place of a GPU by whatever name; anything else as it is."""
    is_gpu = isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda"
    return CPU if is_gpu else value


class _Event:
    def __init__(self, gpu: StandInGpu, enable_timing: bool = False):
        gpu.called("Event")
        self.gpu, self.enable_timing, self.at = gpu, enable_timing, None

    def record(self, stream=None) -> None:
        self.gpu.called("Event.record")
        self.at = self.gpu.seconds

    def synchronize(self) -> None:
        self.gpu.called("Event.synchronize")

    def elapsed_time(self, end: "_Event") -> float:
        assert self.enable_timing and end.enable_timing, "an event without enable_timing has no time"
        return (end.at - self.at) * 1e3


class _Profile:
    """Of torch.profiler: the kernels that were launched inside."""

    def __init__(self, gpu: StandInGpu):
        self.gpu, self.kernels = gpu, []

    def __enter__(self):
        self.gpu.called("profile")
        self.gpu.profiles.append(self)
        return self

    def __exit__(self, *error):
        self.gpu.profiles.remove(self)

    def add(self, name: str, start: float, spent: float) -> None:
        span = SimpleNamespace(start=start * 1e6, elapsed_us=lambda: spent * 1e6)
        self.kernels.append(SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=span))

    def events(self) -> list:
        return self.kernels


class _Capture(TorchDispatchMode):
    """Notes what runs, so that `replay` can run it again and leave the results in the same memory."""

    def __init__(self):
        super().__init__()
        self.steps, self.in_launch = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.in_launch:
            self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                # A tensor whose `data` was replaced since has no such memory.
                if isinstance(old, torch.Tensor) and old.shape == new.shape and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def stand_in_gpu() -> Iterator[StandInGpu]:
    """Yields the stand-in that PyTorch's users see inside."""
    assert not torch.cuda.is_available(), "a GPU is at hand: there is nothing to stand in for"
    gpu = StandInGpu()
    with ExitStack() as stack:
        for owner, name, replacement in _replacements(gpu):
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        stack.enter_context(mock.patch.dict(sys.modules, {"pynvml": _nvml(gpu)}))
        # Saved tensors are packed inside of operations, where they are the CPU's, and compared outside.
        stack.enter_context(
            mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=lambda x: (x.shape, x.dtype))
        )
        stack.enter_context(gpu)
        yield gpu


def _replacements(gpu: StandInGpu) -> Iterator[tuple[object, str, object]]:
    def counted(name, answer=None):
        def call(*args, **kwargs):
            gpu.called(name)
            return answer(*args, **kwargs) if callable(answer) else answer

        return call

    stream = SimpleNamespace(wait_stream=counted("wait_stream"), synchronize=counted("Stream.synchronize"))
    properties = SimpleNamespace(
        name=NAME, total_memory=MEMORY, multi_processor_count=132, L2_cache_size=60 << 20, major=9, minor=0
    )
    answers = {
        "is_available": lambda *_: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: CAPABILITY, "get_device_properties": lambda *_: properties,
        "is_current_stream_capturing": lambda: gpu.capture is not None,
        "set_device": counted("set_device"), "synchronize": counted("synchronize"),
        "empty_cache": counted("empty_cache"), "_sleep": counted("_sleep"),
        "memory_allocated": counted("memory_allocated", 0), "max_memory_allocated": counted("max_memory_allocated", 0),
        "reset_peak_memory_stats": counted("reset_peak_memory_stats"),
        "mem_get_info": counted("mem_get_info", (MEMORY, MEMORY)), "Event": lambda **options: _Event(gpu, **options),
        "Stream": counted("Stream", lambda *_, **__: stream), "current_stream": lambda *_: stream,
        "stream": counted("stream", lambda *_: nullcontext()), "device": counted("device", lambda *_: nullcontext()),
        "CUDAGraph": counted("CUDAGraph", lambda: _Graph(gpu)), "graph": lambda graph, **_: graph.capturing(),
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }  # fmt: skip
    yield from ((torch.cuda, name, answer) for name, answer in answers.items())

    profile, generator = torch.profiler.profile, torch.Generator
    autocast, autocast_is_on, autocast_dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    def profiled(*args, activities=(), **kwargs):
        wants_kernels = torch.profiler.ProfilerActivity.CUDA in activities
        return _Profile(gpu) if wants_kernels else profile(*args, activities=activities, **kwargs)

    def compile_nothing(model=None, **options):
        gpu.called("compile")
        return model if model is not None else lambda function: function

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__(str(on_cpu(device_type)), *args, **kwargs)

    yield torch.profiler, "profile", profiled
    yield torch, "compile", compile_nothing
    yield torch, "Generator", lambda device="cpu": generator(on_cpu(device))
    yield torch, "autocast", Autocast
    yield torch, "is_autocast_enabled", lambda *device: autocast_is_on(*(str(on_cpu(name)) for name in device))
    yield torch, "get_autocast_dtype", lambda device: autocast_dtype(str(on_cpu(device)))
    yield torch.autograd, "_engine_run_backward", _backward_inside(gpu, torch.autograd._engine_run_backward)
    yield InterpretedFunction, "run", _launch_inside(gpu, InterpretedFunction.run)


def _backward_inside(gpu: StandInGpu, run):
    """PyTorch leaves the mode before it differentiates; what runs there must see the GPU, too."""

    def run_inside(*args, **kwargs):
        with gpu:
            return run(*args, **kwargs)

    return run_inside


def _launch_inside(gpu: StandInGpu, run):
    def launch(self, *args, **kwargs):
        gpu.launched(self.fn.__name__, args)
        if gpu.capture is None:
            return run(self, *args, **kwargs)
        capture = gpu.capture
        capture.steps.append((lambda *a, **k: run(self, *a, **k), args, kwargs, None))
        capture.in_launch = True
        try:
            return run(self, *args, **kwargs)
        finally:
            capture.in_launch = False

    return launch


class _Graph:
    def __init__(self, gpu: StandInGpu):
        self.gpu, self.capture = gpu, _Capture()

    @contextmanager
    def capturing(self):
        self.gpu.called("graph")
        self.gpu.capture = self.capture
        try:
            with self.capture:
                yield
        finally:
            self.gpu.capture = None

    def replay(self) -> None:
        self.gpu.called("replay")
        self.capture.replay()


def _nvml(gpu: StandInGpu) -> ModuleType:
    """The names of NVIDIA's management library that `measuring.clocks` uses."""
    nvml = ModuleType("pynvml")
    nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = 1, 2, 0
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetClockInfo = lambda handle, clock: {1: 1980, 2: 3201}[clock]
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 500_000
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 40
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0
    return nvml
