"""The page that shows what a run did and how good its models are."""
