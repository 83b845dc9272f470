"""SGLang, from both sides.

`engine.SglangEngine` puts SGLang's scheduler behind the common protocol: `RolloutBackend` drives it like any other.
`plugin.register` puts the log into an SGLang that others start (`sglang.Engine`, `launch_server`). Both draw every
token of a rollout with the project's position-keyed noise. `versions` says which SGLang this was tested with.
"""
