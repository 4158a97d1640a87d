mod support;
use support::*;
#[test]
fn adhoc() {
    let bench = Bench::new(coffey_pipeline::S3Options {
        region: Some("us-east-1".into()),
        ..Default::default()
    });
    let t = std::time::Instant::now();
    let e = bench.error(config(urls("s3://some-bucket/x.tar")));
    println!("{e} {:?}", t.elapsed());
    let bench = Bench::new(coffey_pipeline::S3Options {
        region: Some("us-east-1".into()),
        anonymous: true,
        ..Default::default()
    });
    let t = std::time::Instant::now();
    let e = bench.error(config(urls("s3://some-bucket/x.tar")));
    println!("{e} {:?}", t.elapsed());
    // speed
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("data")).unwrap();
    for s in 0..4 {
        let mut members = vec![];
        for n in 0..100u32 {
            let img = image::RgbImage::from_fn(768, 600, |x, y| {
                image::Rgb([(x / 3 + n) as u8, (y / 2) as u8, ((x * y) >> 9) as u8])
            });
            let mut b = std::io::Cursor::new(vec![]);
            image::DynamicImage::from(img)
                .write_to(&mut b, image::ImageFormat::Jpeg)
                .unwrap();
            members.push((format!("{s}_{n}.jpg"), b.into_inner()));
            members.push((format!("{s}_{n}.txt"), b"hello".to_vec()));
        }
        std::fs::write(
            root.path().join(format!("data/{s:05}.tar")),
            tar_of(&members),
        )
        .unwrap();
    }
    let bench = Bench::embedded(root.path());
    let mut c = config(urls("s3://data/{00000..00003}.tar"));
    c.image.resolution = 512;
    c.batch_size = 12;
    c.shuffle_buffer = 1000;
    c.open_shards = 4;
    let t = std::time::Instant::now();
    let st = bench.open(c).unwrap();
    let _ = take(&st, &bench.metrics, 1).unwrap();
    println!("first batch {:?}", t.elapsed());
    let _ = take(&st, &bench.metrics, 60).unwrap();
    println!("{} img/s", 61.0 * 12.0 / t.elapsed().as_secs_f64());
    println!(
        "{}",
        serde_json::to_string_pretty(&bench.metrics.snapshot().stages).unwrap()
    );
    println!(
        "{:?} {:?}",
        bench.metrics.limiting_stage(),
        bench.metrics.snapshot().channels
    );
}
