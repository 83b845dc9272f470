"""What several engines share: the state of running requests, admission, identity, and logging inside an engine.

Nothing here names an engine. `requests` and `identity` need torch; the rest does not.
"""
