"""How a run is carried out: recipe, inputs, output folder, rounds, Hub. The methods import nothing from here."""
