"""Stage 2: embeddings, proposals, neighbours, RoI features and correspondences."""
