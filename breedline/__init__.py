"""The nouns of the pipeline: shard sets, patterns, splits, images, learners and bundles. Knows no Prefect."""
