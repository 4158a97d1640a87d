//! Defaults that SDXL has in place of Stable Diffusion's: those of the reference's SDXL scripts. The model is known only after the
//! configuration was read.

use super::Config;

/// `image.resolution`
const RESOLUTION: u32 = 1024;
/// `encode.batch_size`
const ENCODE_BATCH: usize = 8;
/// `distill.w_min`
const W_MIN: f64 = 3.0;

impl Config {
    /// Gives keys that were not written down their values for SDXL. Returns these, as `image.resolution = 1024`.
    pub fn adopt_sdxl_defaults(&mut self) -> Vec<String> {
        let mut adopted = Vec::new();
        if !self.is_written("image.resolution") {
            self.image.resolution = RESOLUTION;
            adopted.push(format!("image.resolution = {RESOLUTION}"));
        }
        if !self.is_written("encode.batch_size") {
            self.encode.batch_size = ENCODE_BATCH;
            adopted.push(format!("encode.batch_size = {ENCODE_BATCH}"));
        }
        // A smaller w_max was checked against the default of Stable Diffusion.
        if !self.is_written("distill.w_min") {
            self.distill.w_min = W_MIN;
            adopted.push(format!("distill.w_min = {W_MIN}"));
        }
        adopted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sdxl_defaults_leave_written_keys_alone() {
        let parse = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
            Config::parse("[data]\nshards = \"a.tar\"\n", "a.toml", &overrides).unwrap()
        };
        let mut config = parse(&[]);
        let adopted = config.adopt_sdxl_defaults();
        assert_eq!(adopted.len(), 3, "{adopted:?}");
        let (image, encode, distill) = (&config.image, &config.encode, &config.distill);
        let values = (image.resolution, encode.batch_size, distill.w_min);
        assert_eq!(values, (1024, 8, 3.0));
        // As it is read back by the next run.
        let text = config.to_toml().unwrap();
        let mut again = Config::parse(&text, "config.toml", &[]).unwrap();
        assert_eq!(again.adopt_sdxl_defaults(), Vec::<String>::new());
        assert_eq!(again, config);

        let written = [
            "image.resolution=512",
            "encode.batch_size=32",
            "distill.w_min=5",
        ];
        let mut config = parse(&written);
        assert_eq!(config.adopt_sdxl_defaults(), Vec::<String>::new());
        assert_eq!(config, parse(&written));
    }
}
