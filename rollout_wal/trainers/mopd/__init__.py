"""The loop closed on one machine: multi-teacher on-policy distillation while everything is killed.

tasks        addition and sorting: prompts, split, verifier
models       a character tokenizer, tiny models, supervised warm starts, greedy accuracy
config       what a run is, as plain data
advantages   what the teachers' opinions of sampled tokens weigh
student      the student's trainer: rollouts, dataset, scores, plan, loss, step, checkpoint; a process of its own
supervisor   starts trainer and scoring server, kills them by a seeded schedule, starts them again
run, report  the demonstration and its page
"""
