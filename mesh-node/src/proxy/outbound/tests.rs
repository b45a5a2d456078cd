use super::*;

#[test]
fn few_dials_are_made_before_patience_ends() {
    for _ in 0..100 {
        let (mut waited, mut dials) = (Duration::ZERO, 0);
        while waited < RETRY_FOR {
            let pause = pause(dials);
            assert!(pause >= FIRST_RETRY_DELAY.mul_f64(0.75) && pause <= MAX_RETRY_DELAY.mul_f64(1.25), "{pause:?}");
            waited += pause;
            dials += 1;
        }
        assert!((7..=14).contains(&dials), "{dials}");
    }
    assert!(pause(u32::MAX) <= MAX_RETRY_DELAY * 2);
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_idle_from_its_last_byte() {
    use std::sync::atomic::Ordering;
    for (idle, busy) in [(Duration::from_secs(2), Duration::from_millis(1_900)), (Duration::from_hours(1), Duration::from_mins(50))] {
        let (limits, traffic) = (TimeLimits { most: None, idle: Some(idle) }, Traffic::default());
        let begun = Instant::now();
        let sends = async {
            for _ in 0..3 {
                sleep(busy).await;
                traffic.sent.fetch_add(1, Ordering::Relaxed);
            }
            std::future::pending::<()>().await;
        };
        let cut = tokio::select! {
            cut = limits.reached(&traffic) => cut,
            () = sends => unreachable!(),
        };
        let over = begun.elapsed().saturating_sub(3 * busy);
        assert!(matches!(cut, Cut::Idle) && over >= idle && over <= idle + idle / 10, "{over:?} of {idle:?}");
    }
    let limits = TimeLimits { most: Some(Duration::from_secs(3)), idle: Some(Duration::from_secs(5)) };
    assert!(matches!(limits.reached(&Traffic::default()).await, Cut::MaxDuration));
}
