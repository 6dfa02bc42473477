"""Handing the result to servers: adapters that vLLM loads, and GGUF files for llama.cpp."""

from hf_unlearn.serving.gguf import export_gguf, export_gguf_adapter
from hf_unlearn.serving.uniform import write_uniform
from hf_unlearn.serving.vllm import Problem, ServingReport, check_servable, write_servable


__all__ = [
    "Problem",
    "ServingReport",
    "check_servable",
    "export_gguf",
    "export_gguf_adapter",
    "write_servable",
    "write_uniform",
]
