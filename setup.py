import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# In the clone these stand under short names, which an environment must not have.
SHIPPED = {"dora_training": "training", "dora_bench": "bench"}

peft = ["peft>=0.21"]
train = [
    *peft,
    "accelerate>=1.15",
    "datasets>=5.2",
    "matplotlib>=3.10",
    "pyyaml>=6.0.1",
    "tqdm>=4.66.3",
    "trl>=1.16",
]
bench = [*peft, "matplotlib>=3.10", "tqdm>=4.66.3"]
quantized = ["bitsandbytes>=0.50"]
liger = ["liger-kernel>=0.8"]


def packages():
    """The engine's, and those of the commands under the names that they are installed by."""
    found = find_packages(str(ROOT), include=["dora_kernels", "dora_kernels.*"])
    for name, folder in SHIPPED.items():
        found += [name, *(f"{name}.{package}" for package in find_packages(str(ROOT / folder)))]
    return found


def version():
    """The engine's `__version__`, read without importing it."""
    source = (ROOT / "dora_kernels" / "versions.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


setup(
    name="dora-kernels",
    version=version(),
    description="Fused Triton kernels for DoRA fine-tuning of Hugging Face and PEFT models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["DoRA", "LoRA", "PEFT", "fine-tuning", "Triton", "CUDA"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2402.09353"},
    python_requires=">=3.10",
    packages=packages(),
    package_dir=SHIPPED,
    package_data={
        "dora_kernels": ["py.typed"],
        "dora_training.demo": ["*.json", "base/*", "data/*"],
        "dora_bench": ["results/*"],
    },
    entry_points={
        "console_scripts": [
            *(f"dora-{name} = dora_training.commands:{name}" for name in ("train", "merge", "export", "plan")),
            "dora-bench = dora_bench.__main__:command",
        ]
    },
    install_requires=[
        "torch>=2.11",
        # CUDA builds of torch bring the Triton they were made for: any version they bring is right.
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "safetensors>=0.8",
    ],
    extras_require={
        "peft": peft,
        "train": train,
        "bench": bench,
        "quantized": quantized,
        "liger": liger,
        "dev": [
            *train,
            *bench,
            *quantized,
            *liger,
            "build>=1.5",
            "compressed-tensors>=0.20; python_version >= '3.11'",
            "hypothesis>=6.100",
            "mypy>=2.4",
            "pytest>=9.0",
            "pytest-random-order>=1.2",
            "pytest-xdist>=3.6.1",
            "ruff>=0.17",
            "setuptools>=77.0.3",
            "tensorboard>=2.20",
        ],
    },
)
