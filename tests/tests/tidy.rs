//! The walls of the house hold.

#[test]
fn dependencies_point_one_way() {
    assert_eq!(isopod_tests::tidy::violations(), Vec::<String>::new());
}
