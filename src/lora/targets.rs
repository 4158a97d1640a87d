//! Which modules of a UNet a LoRA adapts.

use super::{LoraError, Modules};

/// The modules of diffusers' `train_lcm_distill_lora_*_wds.py`: every attention, feed-forward and residual block, and resampling.
pub const DEFAULT_TARGETS: [&str; 14] = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
];

impl Modules {
    /// The modules that have one of the names `targets`, or whose name ends with one of them behind a dot: PEFT's
    /// `check_target_module_exists`.
    ///
    /// # Errors
    /// [`LoraError::Target`] for a target without a module, unless it is one of [`DEFAULT_TARGETS`], of which small UNets lack some;
    /// and where none has one.
    pub fn targeted<S: AsRef<str>>(&self, targets: &[S]) -> Result<Self, LoraError> {
        let found = |target: &str| self.iter().any(|(module, _)| is_targeted(module, target));
        let targets: Vec<&str> = targets.iter().map(AsRef::as_ref).collect();
        let without = |target: &&&str| !DEFAULT_TARGETS.contains(target) && !found(target);
        let modules: Self = self
            .iter()
            .filter(|(module, _)| targets.iter().any(|target| is_targeted(module, target)))
            .map(|(module, shape)| (format!("{module}.weight"), shape.to_vec()))
            .collect();
        let missing = targets
            .iter()
            .find(without)
            .or(match modules.iter().next() {
                None => targets.first(),
                Some(_) => None,
            });
        match missing {
            None => Ok(modules),
            Some(target) => Err(LoraError::Target {
                target: (*target).to_owned(),
                example: self
                    .iter()
                    .next()
                    .map_or("", |(module, _)| module)
                    .to_owned(),
            }),
        }
    }
}

fn is_targeted(module: &str, target: &str) -> bool {
    match module.strip_suffix(target) {
        Some(before) => before.is_empty() || before.ends_with('.'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(names: &[&str]) -> Modules {
        let weights = names.iter();
        weights
            .map(|name| (format!("{name}.weight"), vec![4, 4]))
            .collect()
    }

    fn names(modules: &Modules) -> Vec<&str> {
        modules.iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn targets_are_whole_names_and_ends_behind_a_dot() {
        let all = modules(&["conv_in", "a.conv1", "a.xconv1", "conv1", "a.to_out.0"]);
        let found = all.targeted(&["conv1", "to_out.0"]).unwrap();
        assert_eq!(names(&found), ["a.conv1", "a.to_out.0", "conv1"]);
        assert_eq!(names(&all.targeted(&["a.conv1"]).unwrap()), ["a.conv1"]);
    }

    #[test]
    fn targets_without_a_module_are_refused() {
        let all = modules(&["a.conv1"]);
        let error = all.targeted(&["conv1", "conv9"]).unwrap_err().to_string();
        assert!(
            error.contains("conv9") && error.contains("a.conv1"),
            "{error}"
        );
        assert!(all.targeted(&DEFAULT_TARGETS).is_ok());
        assert!(modules(&["b"]).targeted(&DEFAULT_TARGETS).is_err());
    }
}
