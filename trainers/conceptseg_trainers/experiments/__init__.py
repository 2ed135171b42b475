"""What the experiments of `nano.evidence`, `mini.effects` and `coprs_nano` have in common.

An experiment trains variants ("arms") with several seeds from one checkpoint and measures all of them on the same
held-out samples. `command` has its options and loop, `reinforcement` trains with sampled completions, `run_folder`
keeps results with different settings apart, `measuring` evaluates, and `tables` compares with paired intervals.
"""
