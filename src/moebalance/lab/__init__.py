"""The workshop: train, compare, fine-tune and look, on the public interface of the library.

In reading order:

    recipe       one TOML file that says everything about a run, checked
    text/        text → sequences with a domain each, in an order that a seed fixes
    inputs       a recipe → its text, and a model with fresh weights
    finetune     a recipe → a model from a checkpoint, whole or with LoRA; what a run leaves behind
    checkpoints  folders with weights: is one whole, and is it the same as before
    identity     what tells one run from another
    resume       whether a run begins or goes on
    train        one run, from recipe to log
    trainer      its Trainer
    journal      its log: header, steps, snapshots, evaluations
    evaluate     held-out loss, loads and specialisation in one pass
    interrupt    Ctrl-C between two steps
    compare      methods × seeds × batching: which runs, and which are complete
    workers      runs as processes: how many, how far, how they end
    jobs         what the commands do with a recipe
    progress     how far runs are: bars, or lines
    console      tables and verdicts in the terminal
    traces/      what other tools write about routing, read as runs
    trackers     run logs → TensorBoard, W&B, trackio
    shown        the pictures, tables and percentiles that trackers show
    cli          the commands and their options
    bench/       what each method costs here
    doctor/      what balances a model, and what will leave with its checkpoint
    recipes/     recipes that come with the package
"""
