from pathlib import Path

from setuptools import find_packages, setup

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

setup(
    name="dora-kernels",
    version="0.1.0",
    description="Fused Triton kernels for DoRA fine-tuning of Hugging Face and PEFT models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["DoRA", "LoRA", "PEFT", "fine-tuning", "Triton", "CUDA"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2402.09353"},
    python_requires=">=3.10",
    packages=find_packages(include=["dora_kernels", "dora_kernels.*"]),
    package_data={"dora_kernels": ["py.typed"]},
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
            "hypothesis>=6.100",
            "mypy>=2.4",
            "pytest>=9.0",
            "pytest-random-order>=1.2",
            "pytest-xdist>=3.6.1",
            "ruff>=0.17",
        ],
    },
)
