"""Formation energy per atom against the elements, on the MP2020-corrected PBE scale."""

from proxies.views import PropertyView


class FormationEnergyProxy(PropertyView):
    """Formation energy of the relaxed crystal, plus what the given cell costs if it is far from relaxed."""

    name = "formation_energy_per_atom"
    unit = "eV/atom"
