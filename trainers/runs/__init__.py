"""How a run is carried out: recipe, inputs, output folder, rounds, Hub. The methods do not import from here."""
