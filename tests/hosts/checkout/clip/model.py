def build_model(state_dict, design_details):
    raise NotImplementedError(design_details)
