"""How a run is run: recipe, inputs, output folder, rounds, Hub, errors. The methods know nothing of it."""
