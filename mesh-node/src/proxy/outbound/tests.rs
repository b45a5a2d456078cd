use super::*;

#[test]
fn few_dials_are_made_before_patience_ends() {
    for _ in 0..100 {
        let (mut waited, mut dials) = (Duration::ZERO, 0);
        while waited < RETRY_FOR {
            let pause = pause(dials);
            assert!(pause >= RETRY_AFTER[0].mul_f64(0.75) && pause <= RETRY_AFTER[1].mul_f64(1.25), "{pause:?}");
            waited += pause;
            dials += 1;
        }
        assert!((7..=14).contains(&dials), "{dials}");
    }
    assert!(pause(u32::MAX) <= RETRY_AFTER[1] * 2);
}
