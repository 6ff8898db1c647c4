//! What kubectl needs to speak with an instance, in one file.

use std::path::Path;

use super::{Authority, CertificateError};
use crate::objects::base64;

/// What is printed, or that the instance has never been served.
#[derive(Debug)]
pub enum Kubeconfig {
    /// The file's text. It holds a key.
    Text(String),
    /// There is no authority yet.
    NeverServed,
}

/// A kubeconfig for the instance of that name, whose server is at `address`, with a certificate of
/// its own.
///
/// # Errors
/// When the authority cannot be read.
pub fn kubeconfig(
    directory: &Path,
    instance: &str,
    address: &str,
) -> Result<Kubeconfig, CertificateError> {
    let Some(authority) = Authority::existing(directory, instance)? else {
        return Ok(Kubeconfig::NeverServed);
    };
    let (certificate, key) = authority.of_client()?;
    let authority = base64(authority.certificate.as_bytes());
    let certificate = base64(certificate.as_bytes());
    let key = base64(key.as_bytes());
    let name = format!("pericarp-{instance}");
    Ok(Kubeconfig::Text(format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: {name}\n\
         \x20 cluster:\n\
         \x20   server: https://{address}\n\
         \x20   certificate-authority-data: {authority}\n\
         users:\n\
         - name: {name}\n\
         \x20 user:\n\
         \x20   client-certificate-data: {certificate}\n\
         \x20   client-key-data: {key}\n\
         contexts:\n\
         - name: {name}\n\
         \x20 context:\n\
         \x20   cluster: {name}\n\
         \x20   user: {name}\n\
         current-context: {name}\n"
    )))
}
