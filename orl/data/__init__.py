"""Photos in: manifest, decoder, dataset layouts, the scene generator, and view geometry."""
