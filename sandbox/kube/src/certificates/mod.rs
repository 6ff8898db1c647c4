//! Who may speak with the server, and how clients know that it is the server.
//!
//! Each instance has an authority of its own, whose key only root can read. It signs the server's
//! certificate, which lives in memory and is renewed every day, and one for each kubeconfig that is
//! printed. Nobody without one of these is heard.

mod keeping;
mod kubeconfig;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring::{default_provider, sign::any_supported_type},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use thiserror::Error;

pub use self::kubeconfig::{Kubeconfig, kubeconfig};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// An authority is as old as this at most; kubeconfigs are printed anew after it.
const AUTHORITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// With less than this left, the next start makes another.
const TOO_SHORT: Duration = Duration::from_secs(180 * 24 * 60 * 60);
/// The server's certificate.
const SERVER: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// A client's.
const CLIENT: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Clocks differ.
const EARLIER: Duration = Duration::from_secs(60 * 60);

/// Why there are no certificates.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {what}; remove it for a new authority, and print kubeconfigs anew")]
    Garbled {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Making(#[from] rcgen::Error),
    /// TLS does not take it.
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
}

/// The authority of an instance, and what it has signed for the server.
#[derive(Debug)]
pub struct Certificates {
    authority: Authority,
    /// What clients may call the server.
    names: Vec<String>,
    shown: Arc<Shown>,
}

/// Who signs.
#[derive(Debug)]
struct Authority {
    certificate: String,
    key: KeyPair,
    name: String,
}

/// The certificate that is shown to clients, which is another every day.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let shown = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&shown))
    }
}

impl Certificates {
    /// The authority of the instance of that name, from its directory; a new one if there is none or
    /// it ends soon. Clients may call the server by `address` and `host`, and as it is called on
    /// this machine.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn open(
        directory: &Path,
        instance: &str,
        address: IpAddr,
        host: &str,
    ) -> Result<Self, CertificateError> {
        let authority = Authority::open(directory, instance)?;
        let own = ["127.0.0.1", "::1", "localhost"].map(str::to_owned);
        let mut names: Vec<String> = own.into();
        let address = (!address.is_unspecified()).then(|| address.to_string());
        for name in address.into_iter().chain([host.to_owned()]) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let shown = Arc::new(Shown(RwLock::new(authority.of_server(&names)?)));
        Ok(Self {
            authority,
            names,
            shown,
        })
    }

    /// How the server speaks: with a certificate of the authority's, to who has one.
    pub(crate) fn server(&self) -> Result<Arc<ServerConfig>, CertificateError> {
        let tls = |error: &dyn std::fmt::Display| CertificateError::Tls(error.to_string());
        let provider = Arc::new(default_provider());
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from_pem_slice(self.authority.certificate.as_bytes());
        roots
            .add(authority.map_err(|error| tls(&error))?)
            .map_err(|error| tls(&error))?;
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .map_err(|error| tls(&error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| tls(&error))?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::clone(&self.shown) as Arc<dyn ResolvesServerCert>);
        // Streams need HTTP/1.1, and nothing here gains by the next one.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// Renews the server's certificate every day, for ever.
    pub(crate) async fn renew(self) {
        loop {
            tokio::time::sleep(DAY).await;
            match self.authority.of_server(&self.names) {
                Ok(new) => {
                    *self.shown.0.write().unwrap_or_else(PoisonError::into_inner) = new;
                }
                Err(error) => log::error!("the server's certificate is not renewed: {error}"),
            }
        }
    }
}

impl Authority {
    fn open(directory: &Path, instance: &str) -> Result<Self, CertificateError> {
        let now = SystemTime::now();
        if let Some(kept) = keeping::read(directory)? {
            if kept.until > now + TOO_SHORT {
                return Self::of(directory, instance, kept);
            }
            log::warn!("the authority of {instance} is renewed; print kubeconfigs anew");
        }
        let key = KeyPair::generate()?;
        let until = now + AUTHORITY;
        let certificate = params_of_authority(instance, until)?
            .self_signed(&key)?
            .pem();
        let kept = keeping::Kept {
            certificate,
            key: key.serialize_pem(),
            until,
        };
        keeping::write(directory, &kept)?;
        Self::of(directory, instance, kept)
    }

    /// The one that is there, for who only signs.
    fn existing(directory: &Path, instance: &str) -> Result<Option<Self>, CertificateError> {
        match keeping::read(directory)? {
            Some(kept) => Self::of(directory, instance, kept).map(Some),
            None => Ok(None),
        }
    }

    fn of(directory: &Path, instance: &str, kept: keeping::Kept) -> Result<Self, CertificateError> {
        let key = KeyPair::from_pem(&kept.key).map_err(|error| CertificateError::Garbled {
            path: keeping::key(directory),
            what: error.to_string(),
        })?;
        Ok(Self {
            certificate: kept.certificate,
            key,
            name: instance.to_owned(),
        })
    }

    fn issuer(&self) -> Result<Issuer<'_, &KeyPair>, CertificateError> {
        // Only its name and its key are in what it signs.
        let params = params_of_authority(&self.name, SystemTime::now() + AUTHORITY)?;
        Ok(Issuer::new(params, &self.key))
    }

    /// A certificate for these names, and its key, both as PEM.
    fn sign(
        &self,
        names: &[String],
        whose: &[(DnType, &str)],
        usage: ExtendedKeyUsagePurpose,
        time: Duration,
    ) -> Result<(rcgen::Certificate, KeyPair), CertificateError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name = DistinguishedName::new();
        for (of, text) in whose {
            params.distinguished_name.push(of.clone(), *text);
        }
        let now = SystemTime::now();
        params.not_before = (now - EARLIER).into();
        params.not_after = (now + time).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &self.issuer()?)?;
        Ok((certificate, key))
    }

    fn of_server(&self, names: &[String]) -> Result<Arc<CertifiedKey>, CertificateError> {
        let name = format!("pericarp {}", self.name);
        let whose = [(DnType::CommonName, name.as_str())];
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        let (certificate, key) = self.sign(names, &whose, usage, SERVER)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        let key = any_supported_type(&PrivateKeyDer::from(key))
            .map_err(|error| CertificateError::Tls(error.to_string()))?;
        let chain = vec![certificate.der().clone()];
        Ok(Arc::new(CertifiedKey::new(chain, key)))
    }

    /// A client's certificate and key, as PEM. Its group is that of Kubernetes' administrators.
    fn of_client(&self) -> Result<(String, String), CertificateError> {
        let whose = [
            (DnType::OrganizationName, "system:masters"),
            (DnType::CommonName, "admin"),
        ];
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        let (certificate, key) = self.sign(&[], &whose, usage, CLIENT)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

fn params_of_authority(
    instance: &str,
    until: SystemTime,
) -> Result<CertificateParams, CertificateError> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name = DistinguishedName::new();
    let name = format!("pericarp {instance} authority");
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = (SystemTime::now() - EARLIER).into();
    params.not_after = until.into();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

#[cfg(test)]
mod tests;
