"""Teachers inside inference engines, each in a process of its own.

`source` and `process` are the server's side and import no engine. `main` is what the process runs, `vllm_runner` and
`sglang_runner` are its engines, `rows` turns their hidden states into scores.
"""
